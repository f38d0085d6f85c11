"""The flows, ready to call, to serve and to deploy. Each is in a module of its own, and loads on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_eachlabs._late import late

if TYPE_CHECKING:
    from prefect_eachlabs.flows.audit import aaudit_bill as aaudit_bill
    from prefect_eachlabs.flows.audit import audit_bill as audit_bill
    from prefect_eachlabs.flows.batch import agenerate_batch as agenerate_batch
    from prefect_eachlabs.flows.batch import generate_batch as generate_batch
    from prefect_eachlabs.flows.image import agenerate_image as agenerate_image
    from prefect_eachlabs.flows.image import generate_image as generate_image
    from prefect_eachlabs.flows.schedule import ascheduled_image as ascheduled_image
    from prefect_eachlabs.flows.schedule import scheduled_image as scheduled_image
    from prefect_eachlabs.flows.settle import asettle_leftovers as asettle_leftovers
    from prefect_eachlabs.flows.settle import settle_leftovers as settle_leftovers
else:
    __all__, __getattr__, __dir__ = late(
        __name__,
        {
            "audit": "audit_bill aaudit_bill",
            "batch": "generate_batch agenerate_batch",
            "image": "generate_image agenerate_image",
            "schedule": "scheduled_image ascheduled_image",
            "settle": "settle_leftovers asettle_leftovers",
        },
    )
