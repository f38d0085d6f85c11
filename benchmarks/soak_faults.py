"""What goes wrong in the soak, and how often; and the account that lives with it."""

from __future__ import annotations

REQUESTS_PER_MINUTE = 900
MAX_IN_FLIGHT = 30
CLAIM_SECONDS = 24
"""A POST begins within 4 s of its claim (a sixth), is given up after 12 s (half); a freeze may take 8 s (a third)."""
SETTLING_SECONDS = 8
"""An abandoned POST creates nothing later and is listed by then: late 1.5 s, listed late 3 s, stale 2 s: 6.5."""
FROZEN_SECONDS = (1.0, 6.0)
"""A freeze of more than 8 s between the last check and the POST may buy once too many: the guarantee says so."""
SERVICE_SECONDS = 1.5
PICTURE_PX = 64
PRICE_USD = 0.039
CLOCK_JUMPS_HOURS = (-30.0, 30.0)
API_CLOCK_OFF_SECONDS = 5_400

EMULATOR_FLAGS = (
    *("--requests-per-minute", str(REQUESTS_PER_MINUTE), "--max-in-flight", str(MAX_IN_FLIGHT)),
    *("--service-seconds", str(SERVICE_SECONDS), "--spread", "0.4", "--cost-usd", str(PRICE_USD)),
    *("--pictures", "plain", "--image-size-px", str(PICTURE_PX)),
    *("--clock-skew-seconds", str(API_CLOCK_OFF_SECONDS), "--retry-after", "seconds"),
)
ACCOUNT = {
    "EACHLABS_API_KEY": "a-key-of-the-soak",
    "EACHLABS_REQUESTS_PER_MINUTE": str(REQUESTS_PER_MINUTE),
    "EACHLABS_MAX_IN_FLIGHT": str(MAX_IN_FLIGHT),
    "EACHLABS_CLAIM_SECONDS": str(CLAIM_SECONDS),
    "EACHLABS_SETTLING_SECONDS": str(SETTLING_SECONDS),
    "EACHLABS_ACCOUNT": "soak",
}

POISON, LATE, INTERRUPTED = "(poison)", "(late)", "interrupted"
"""Words of prompts, by which faults find them."""
INTERRUPTED_SECONDS = 15.0
ALWAYS = (f"create:empty_error,status=500,matching={POISON}",)
"""Also in the calm: an order that is never taken."""
API_FAULTS = (
    *ALWAYS,
    # The one list that is later than settling: it may make a buyer order once more, and never twice more.
    f"create:lost_answer=0.4,matching={LATE}",
    f"prediction:listed_late,seconds=45,matching={LATE}",
    # So that there is something to cancel.
    f"prediction:slow,seconds={INTERRUPTED_SECONDS:g},matching={INTERRUPTED}",
    # Orders: nothing is done.
    *("create:cut=0.01", "create:reset=0.01", "create:error=0.01", "create:html=0.005"),
    *("create:throttled=0.004", "create:no_balance=0.001"),
    # Orders: bought, and the answer is lost, late or unreadable.
    *("create:lost_answer=0.02", "create:lost_reset=0.01", "create:cut_body=0.01", "create:error_after=0.01"),
    *("create:html_after=0.005", "create:malformed=0.01", "create:no_id=0.005", "create:late=0.004,seconds=13.5"),
    *("create:late_answer=0.004,seconds=14", "create:drip=0.004,seconds=14", "create:id_name=0.02,value=exec_id"),
    # Questions.
    *("get:cut=0.01", "get:error=0.02", "get:html=0.01", "get:throttled=0.005", "get:lost_answer=0.02"),
    *(
        "get:cut_body=0.02",
        "get:malformed=0.02",
        "get:not_found=0.02,seconds=2",
        "get:status_word=0.02",
    ),
    *("get:stale=0.02,seconds=2", "get:drip=0.005,seconds=4"),
    # The list by which lost orders are found: it lags, it breaks.
    *("executions:cut=0.02", "executions:error=0.02", "executions:throttled=0.01", "executions:missing=0.01"),
    *("executions:malformed=0.02", "executions:cut_body=0.02", "executions:stale=0.2,seconds=2"),
    # It does not see: empty, in short pages, or of names and ids that are not ours.
    *("executions:empty_list=0.05", "executions:short_pages=0.1,value=7", "executions:short_pages_untold=0.1,value=7"),
    *("executions:other_model=0.03", "executions:other_ids=0.03"),
    *("prediction:listed_late=0.1,seconds=3", "cancel:error=0.1", "cancel:lost_answer=0.1"),
    # What the model does, and how it is told.
    *("prediction:fail=0.01", "prediction:fail_retryable=0.01", "prediction:fail_logs=0.005"),
    *("prediction:fail_under_success=0.005", "prediction:slow=0.02,seconds=8", "prediction:output_list=0.02"),
    *("prediction:output_json=0.02", "prediction:output_images=0.02", "prediction:echo_normalised=0.02"),
    *("prediction:echo_defaults=0.02", "prediction:echo_text=0.02"),
    *("prediction:late_output=0.03,seconds=4", "prediction:late_cost=0.2,seconds=5"),
)
FILE_FAULTS = (
    # A host that has not got a picture yet when it is asked first.
    *("picture:not_found=0.1,first=2", "picture:error=0.1,first=3"),
    *("picture:truncated=0.02", "picture:cut=0.02", "picture:reset=0.01", "picture:wrong_length=0.01"),
    *("picture:no_length=0.01", "picture:trailing=0.01", "picture:bad_crc=0.02", "picture:html=0.01"),
    "picture:empty=0.01",  # not picture:jpeg, which is stored as it comes, where no formats are named
    *("picture:throttled=0.01", "picture:slow=0.01,seconds=4", "picture:bomb=0.005", "picture:redirect=0.02"),
    "picture:redirect_loop=0.005",
)

BUDGET_PICTURES = 6
BUDGET_USD = BUDGET_PICTURES * PRICE_USD
