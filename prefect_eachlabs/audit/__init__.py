"""The audit: what the account was billed, joined with what the records of one or more destinations account for."""
