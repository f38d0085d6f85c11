"""The vendor calls when a prediction has ended: who is believed, how calls come in, and what they change."""
