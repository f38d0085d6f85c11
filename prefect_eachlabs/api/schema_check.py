"""An input held against a model's JSON Schema, in a confined process.

The schema comes from afar. A pattern of ten characters (`^(a+)+$`), or one that refers to itself twice, may take years,
and a regular expression holds every thread of its process meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from prefect_eachlabs.confined import Answer, ConfinedProcess, Read

MOST_FAULTS = 100
FAULT_CHARACTERS = 200
SECONDS = 2.0
BESIDE = ("input.prompt:", "input.image_url:")


def faults_of(schema: bytes, *inputs: Mapping[str, Any]) -> list[list[str]]:
    """What a schema (JSON) has against each input, field by field, at most 100 lines. Blocks.

    Several at once cost little more than one: half of a millisecond's work is the way to the process and back.

    Raises:
        ConfinedError: The schema is not one, or checking takes more than 2 s for all, or too much memory.
        OSError: No process can be started.
    """
    answer, _ = _process.call({"inputs": list(map(dict, inputs))}, schema, seconds=SECONDS)
    return [list(map(str, faults)) for faults in answer["faults"]]


class SchemaCheck:
    """The job; in the child alone."""

    def __init__(self) -> None:
        # Half a second, which most runs need not pay.
        from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]  # noqa: PLC0415 - it ships no types
        from referencing import Registry  # noqa: PLC0415 - as above

        self._default, self._kind_of, self._registry = Draft202012Validator, validator_for, Registry

    def __call__(self, arguments: dict[str, Any], data: bytes, read: Read) -> Answer:
        schema = json.loads(data)
        # An empty registry: what the schema refers to elsewhere is not fetched.
        kind = self._kind_of(schema, default=self._default)(schema, registry=self._registry())
        return {"faults": [_faults(kind, schema, input) for input in arguments["inputs"]]}, b""


def _faults(kind: Any, schema: Mapping[str, Any], input: Any) -> list[str]:
    found = islice(kind.iter_errors(input), MOST_FAULTS)
    faults = sorted(found, key=lambda fault: [str(step) for step in fault.absolute_path])
    lines = [line for fault in faults for line in _worded(fault, schema)][:MOST_FAULTS]
    # Whoever gives these two gives them beside the input.
    return [line.removeprefix("input.") if line.startswith(BESIDE) else line for line in lines]


def _worded(fault: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    path = ".".join(["input", *map(str, fault.absolute_path)])
    if fault.validator == "required" and isinstance(fault.instance, Mapping):
        missing = [name for name in fault.validator_value if name not in fault.instance]
        yield from (f"{path}.{str(name)[:60]}: missing" for name in missing if f"'{name}'" in fault.message)
    elif fault.validator == "additionalProperties" and not fault.absolute_path:
        known = schema.get("properties", {})
        unknown = [name for name in fault.instance if name not in known]
        yield f"{path}.{listed(unknown)}: not known to this model, which takes {listed(known)}"
    elif fault.validator in ("maxLength", "minLength") and isinstance(fault.instance, str):
        bound = "most" if fault.validator == "maxLength" else "least"
        yield f"{path}: {len(fault.instance):,} characters, at {bound} {fault.validator_value:,}"
    else:
        said = fault.message
        # It begins with the value, which may be long, and ends with what is wrong about it.
        too_long = len(said) > FAULT_CHARACTERS
        yield f"{path}: {said[:60]}…{said[-FAULT_CHARACTERS + 60 :]}" if too_long else f"{path}: {said}"


def listed(names: Any) -> str:
    """Some names of fields, as they may be shown."""
    shown = [str(name)[:60] for name in names]
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "") or "none"


_process = ConfinedProcess("prefect_eachlabs.api.schema_check:SchemaCheck")
