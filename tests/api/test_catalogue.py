"""The catalogue of models: what each takes is asked for once a run, and what it would refuse costs nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from prefect_eachlabs.api import schema_check
from prefect_eachlabs.api.catalogue import Catalogue, Model, ReferenceField
from prefect_eachlabs.api.single_flight import SingleFlight
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.cli.models import _described, _line
from prefect_eachlabs.errors import BadInput, EachlabsError, KeyRefused, PredictionFailed, Rejected, Unanswered
from prefect_eachlabs.models import Item
from prefect_eachlabs.tasks import generate_and_store
from prefect_eachlabs.testing.emulator.state import MODELS
from tests.api.reference_kit import Shop, buy, picture_bytes
from tests.flows.flow_fixtures import Studio
from tests.virtual_time import run

Printed = pytest.CaptureFixture[str]
URL = "https://cdn.example.org/a.png"


def model_of(**properties: Mapping[str, Any]) -> Model:
    required = [name for name, schema in properties.items() if schema.get("needed")]
    schema = {"type": "object", "required": required, "properties": properties}
    return Model.parse({"slug": "m", "request_schema": schema})


# ------------------------------------------------------------------------------------ where the picture goes


@pytest.mark.parametrize(
    ("properties", "field"),
    [
        ({"prompt": {}, "image_url": {"type": "string"}}, ReferenceField("image_url", False)),
        ({"image": {"type": "string"}}, ReferenceField("image", False)),
        ({"image_urls": {"type": "array"}}, ReferenceField("image_urls", True)),
        ({"input_image": {"type": ["string", "null"]}}, ReferenceField("input_image", False)),
        ({"images": {"anyOf": [{"type": "array"}, {"type": "null"}]}}, ReferenceField("images", True)),
        ({"images": {"anyOf": [{"type": "array"}, {"type": "string"}]}}, ReferenceField("images", False)),
        (
            {"image": {"type": "string"}, "image_urls": {"type": "array", "needed": 1}},
            ReferenceField("image_urls", True),
        ),
        ({"image": {}, "image_url": {}}, ReferenceField("image_url", False)),
        ({"prompt": {}, "mask": {}}, None),
        ({}, None),
    ],
)
def test_the_schema_says_which_field_takes_the_reference_picture(
    properties: dict[str, Any], field: ReferenceField | None
) -> None:
    assert model_of(**properties).reference_field == field


def test_the_picture_is_put_where_the_model_wants_it_and_nowhere_else() -> None:
    given = {"prompt": "x", "image_url": URL}
    assert model_of(image_url={"type": "string"}).placed(given) == given
    assert model_of(image_url={"type": "array"}).placed(given) == {"prompt": "x", "image_url": [URL]}
    assert model_of(input_image={}).placed(given) == {"prompt": "x", "input_image": URL}
    assert model_of(images={"type": "array"}).placed(given) == {"prompt": "x", "images": [URL]}
    assert model_of(images={"type": "array"}).placed({**given, "images": ["b"]})["images"] == [URL, "b"]
    assert model_of(image={}).placed({"prompt": "x", "image": URL}) == {"prompt": "x", "image": URL}
    assert Model.parse({}, "m").placed(given) == given, "without a schema: what the user wrote"


def test_a_picture_that_the_model_would_ignore_is_refused() -> None:
    with pytest.raises(BadInput, match=r"model 'm' takes no reference picture \(its fields: prompt, seed\)"):
        model_of(prompt={}, seed={}).placed({"image_url": URL})
    with pytest.raises(BadInput, match="takes one reference picture, in its field 'image', which the input fills"):
        model_of(image={}).placed({"image_url": URL, "image": "https://cdn.example.org/b.png"})


# -------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("slug", "input", "faults"),
    [
        ("imagen-4", {"prompt": "x", "num_images": 2}, []),
        ("imagen-4", {"prompt": "x", "num_images": 9}, ["input.num_images: 9 is greater than the maximum of 4"]),
        ("imagen-4", {"prompt": "x", "num_images": "2"}, ["input.num_images: '2' is not of type 'integer'"]),
        ("imagen-4", {}, ["prompt: missing"]),
        ("imagen-4", {"prompt": "x", "sed": 1}, ["input.sed: not known to this model, which takes prompt, num_images"]),
        ("flux-1-1-pro", {"prompt": "x", "aspect_ratio": "2:1"}, ["input.aspect_ratio: '2:1' is not one of"]),
        ("nano-banana-pro-edit", {"prompt": "x", "image_urls": [1]}, ["input.image_urls.0: 1 is not of type 'string'"]),
        ("upscaler", {"image": URL, "anything": "else"}, []),
        ("schemaless", {"what": "ever"}, []),
    ],
)
def test_faults_are_told_field_by_field(slug: str, input: dict[str, Any], faults: list[str]) -> None:
    found = Model.parse(MODELS[slug]).faults_of(input)[0]
    assert len(found) == len(faults)
    for said, wanted in zip(found, faults, strict=True):
        assert said.startswith(wanted)


async def test_many_faults_are_all_counted_and_some_are_told() -> None:
    engine, wrong = Shop().process(), {**dict.fromkeys("abc", 1), "seed": -1}
    with pytest.raises(
        BadInput, match=r"input.a, b, c: not known.*; prompt: 10,001 characters, at most 10,000; input.seed"
    ) as info:
        await buy(engine, "x" * 10_001, model="flux-1-1-pro", input=wrong)
    assert "`prefect-eachlabs models flux-1-1-pro` shows what flux-1-1-pro takes" in info.value.message
    assert "Nothing was bought." in info.value.message
    assert len(info.value.message) < 1_500
    assert info.value.item_id


async def test_a_bound_that_was_passed_is_told_in_numbers() -> None:
    shop = Shop()
    with pytest.raises(Rejected) as info:  # the first model's input is held against its schema by the API alone
        await buy(shop.process(), "x" * 20_000)
    assert info.value.message == (
        "prompt: 20,000 characters, at most 10,000. `prefect-eachlabs models gemini` shows what gemini takes. "
        "Nothing was bought."
    )
    assert "xxx" not in str(info.value)
    assert info.value.details is None
    with pytest.raises(PredictionFailed, match="20,000 characters, at most 10,000"):  # from the record
        await buy(shop.process(), "x" * 20_000)


GEMNI = (
    "model: the catalogue has no model 'gemni'. Did you mean gemini? `prefect-eachlabs models` lists what there is. "
    "Nothing was bought."
)


async def test_a_misspelt_model_is_told_with_the_nearest_ones_and_asked_about_once() -> None:
    shop = Shop()
    engine = shop.process()
    for number in range(3):
        with pytest.raises(Rejected) as info:
            await buy(engine, f"a fox {number}", model="gemni")
        assert info.value.message == GEMNI
    assert (shop.requests()["model"], shop.requests()["models"]) == (1, 1)


async def test_a_refusal_that_the_catalogue_cannot_explain_keeps_the_apis_words() -> None:
    shop = Shop("create:error,status=422", "models:error,status=500")
    with pytest.raises(Rejected, match=r"HTTP 422\)"):
        await buy(shop.process(), "a fox")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 7},
        {"properties": {"prompt": {"$ref": "https://schemas.example.org/x.json"}}},
        {"properties": {"prompt": {"$ref": "#/nowhere"}}},
        {"properties": {"prompt": {"pattern": "("}}},
        {"properties": 7},
        "text",
        None,
    ],
)
def test_a_schema_that_is_none_checks_nothing_and_fetches_nothing(schema: object) -> None:
    model = Model.parse({"slug": "m", "request_schema": schema, "title": 7, "output_type": ["x"]})
    assert model.faults_of({"prompt": "x"}) == [[]]
    assert (model.title, model.output_type) == ("m", "")


DOUBLING = {"$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}} | {
    "properties": {"prompt": {"$ref": "#/$defs/d0"}}
}
DOUBLING["$defs"]["d40"] = {}


@pytest.mark.parametrize(
    "schema",
    [{"properties": {"prompt": {"pattern": "^(a+)+$"}}}, DOUBLING, {"patternProperties": {"^(p?)*(r|rompt)+$$": {}}}],
    ids=["a pattern that backtracks", "references that double", "a harmless one"],
)
def test_a_schema_that_would_take_years_is_given_up_once_and_inputs_go_unchecked(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = 10.0 if "patternProperties" in schema else 0.2
    monkeypatch.setattr(schema_check, "SECONDS", seconds)
    schema_check.faults_of(b"{}", {})  # the child is there
    model = Model.parse({"slug": "m", "request_schema": schema})
    assert model.faults_of({"prompt": "a" * 40 + "!"}) == [[]]
    assert model.faults_of({"prompt": "a" * 40 + "!"}) == [[]]
    assert caplog.text.count("took more than") == (0 if "patternProperties" in schema else 1)
    assert "took more than 0.2 s" in caplog.text or seconds > 1


def test_several_inputs_are_one_call_of_the_child_and_each_has_its_own_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = schema_check._process.call

    def counted(arguments: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(arguments["inputs"]))
        return call(arguments, *args, **kwargs)

    monkeypatch.setattr(schema_check._process, "call", counted)
    none, missing = Model.parse(MODELS["imagen-4"]).faults_of({"prompt": "x"}, {})
    assert (none, missing, calls) == ([], ["prompt: missing"], [2])


def test_a_schema_of_megabytes_checks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(prompt={"description": "x" * 300_000, "maxLength": 1})
    assert model.faults_of({"prompt": "long"}) == [[]]
    assert "its schema cannot be used (it has 300" in caplog.text


# --------------------------------------------------------------------------------------------------- asked


async def test_the_first_model_is_known_without_a_request() -> None:
    shop = Shop()
    engine = shop.process()
    await asyncio.gather(*(buy(engine, f"fox {n}", "https://cdn.example.org/a.png") for n in range(5)))
    assert set(shop.requests()) == {"create", "get", "executions", "picture"} & set(shop.requests())


async def test_another_model_is_asked_for_once_a_run_and_its_question_takes_a_request_place() -> None:
    shop = Shop()
    engine = shop.process()
    await asyncio.gather(*(buy(engine, f"fox {n}", model="imagen-4") for n in range(5)))
    assert (shop.requests()["model"], shop.requests()["create"]) == (1, 5)
    await buy(shop.process(), "one more", model="imagen-4")
    assert shop.requests()["model"] == 2


@pytest.mark.parametrize("fault", ["models:error,next=1", "models:malformed,next=1", "models:throttled,next=1"])
async def test_a_catalogue_that_stumbles_is_asked_again_and_nothing_is_bought_meanwhile(fault: str) -> None:
    shop = Shop(fault)
    engine = shop.process()
    with pytest.raises(EachlabsError) as info:
        await buy(engine, "a fox", model="imagen-4")
    assert info.value.retryable
    assert shop.requests()["create"] == 0
    await buy(engine, "a fox", model="imagen-4")


class Librarian:
    """Answers every question with one error."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked = 0

    async def model(self, slug: str) -> Mapping[str, Any]:
        self.asked += 1
        raise self.error

    async def models(self, name: str = "", *, limit: int = 100, offset: int = 0) -> list[Any]:
        raise self.error


async def test_a_model_that_the_catalogue_does_not_show_gets_what_the_user_wrote() -> None:
    librarian = Librarian(Rejected("no", status_code=404))
    catalogue = Catalogue(librarian, None)
    item = Item.wanted(model="secret-model", image_url=URL, input={"size": 7})
    for _ in range(3):
        assert await catalogue.checked(item) == {"size": 7, "image_url": URL}
    assert librarian.asked == 1


def test_a_key_that_is_refused_is_no_missing_model() -> None:
    with pytest.raises(KeyRefused):
        run(Catalogue(Librarian(KeyRefused("no", status_code=401)), None).model("m"))


async def test_once_is_once_for_all_who_ask_and_each_gets_an_error_of_its_own() -> None:
    once: SingleFlight[str, int] = SingleFlight()
    asked: list[str] = []

    async def answer() -> int:
        asked.append("x")
        await asyncio.sleep(1)
        return len(asked)

    async def fail() -> int:
        asked.append("f")
        raise BadInput("no")

    async def stumble() -> int:
        asked.append("s")
        raise Unanswered("again")

    impatient = asyncio.ensure_future(once.get("a", answer))
    waiting = [asyncio.ensure_future(once.get("a", answer)) for _ in range(5)]
    await asyncio.sleep(0.5)
    impatient.cancel()
    assert [await each for each in waiting] == [1] * 5
    for key, ask, times in (("b", fail, 1), ("c", stumble, 2)):
        errors = await asyncio.gather(*(once.get(key, ask) for _ in range(2)), return_exceptions=True)
        errors += await asyncio.gather(once.get(key, ask), return_exceptions=True)
        assert len({id(error) for error in errors}) == 3
        assert asked.count(key.translate({98: "f", 99: "s"})) == times
    await asyncio.sleep(61)
    with pytest.raises(BadInput):
        await once.get("b", fail)
    assert asked.count("f") == 2, "a minute later somebody may have mended it"
    await once.aclose()


# ------------------------------------------------------------------------------- three models, all the way


def test_three_models_with_different_schemas_are_bought_by_the_same_call(studio: Studio) -> None:
    place = studio.destination
    closed = generate_and_store.fn("a fox", model="flux-1-1-pro", input={"seed": 7}, destination=place)
    listed = generate_and_store.fn("a fox", model="nano-banana-pro-edit", image_url=picture_bytes(1), destination=place)
    several = generate_and_store.fn("a fox", model="imagen-4", input={"num_images": 3}, destination=place)
    renamed = generate_and_store.fn(model="upscaler", image_url=picture_bytes(1), input={"scale": 4}, destination=place)
    assert [len(image.more_uris) for image in (closed, listed, several, renamed)] == [0, 0, 2, 0]
    sent = {one["model"]: one["input"] for one in studio.api.predictions()}
    url = sent["upscaler"]["image"]
    assert url.startswith(f"{studio.api.url}/uploads/")
    assert sent["nano-banana-pro-edit"] == {"prompt": "a fox", "image_urls": [url]}
    assert sent["upscaler"] == {"image": url, "scale": 4}
    tallies = studio.api.tallies()
    assert (tallies["billed"], tallies["requests_by_endpoint"]["model"], tallies["uploads"]) == (4, 4, 1)


def test_what_a_model_would_refuse_is_refused_before_the_first_post(studio: Studio) -> None:
    place = studio.destination
    with pytest.raises(BadInput, match=r"input.sede: not known to this model, which takes prompt, aspect_ratio"):
        generate_and_store.fn("a fox", model="flux-1-1-pro", input={"sede": 1}, destination=place)
    with pytest.raises(BadInput, match=r"image_urls: missing"):
        generate_and_store.fn("a fox", model="nano-banana-pro-edit", destination=place)
    with pytest.raises(BadInput, match="takes no reference picture"):
        generate_and_store.fn("a fox", model="imagen-4", image_url=picture_bytes(1), destination=place)
    tallies = studio.api.tallies()
    assert (tallies["billed"], tallies["uploads"], studio.keys("records/")) == (0, 0, [])


# ---------------------------------------------------------------------------------------- the command line


def test_models_lists_the_catalogue_without_a_key(
    studio: Studio, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EACHLABS_API_KEY")
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(MODELS)
    assert "needs prompt, image_urls; reference picture: image_urls (several)" in "\n".join(lines)
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert {one["slug"]: one["reference_field"] for one in found}["flux-kontext-pro"] == "input_image"
    assert studio.api.tallies()["unauthorized"] == 0


def test_models_of_a_slug_says_what_it_takes_a_line_a_field(studio: Studio, capsys: Printed) -> None:
    assert main(["models", "nano-banana-pro-edit"]) == 0
    shown = capsys.readouterr().out
    assert "Nano Banana Pro Edit (nano-banana-pro-edit) puts out a list of pictures." in shown
    assert "  image_urls: list of string; needed; the reference picture" in shown
    assert "minItems 1; maxItems 8" in shown
    assert main(["models", "flux-1-1-pro"]) == 0
    shown = capsys.readouterr().out
    assert "  aspect_ratio: string; enum 1:1, 16:9, 9:16, 4:3, 3:4; default 1:1\n" in shown
    assert "It takes no other field." in shown
    assert main(["models", "schemaless"]) == 0
    assert "no schema of it: its inputs go unchecked" in capsys.readouterr().out
    assert main(["models", "imagen-4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request_schema"]["properties"]["num_images"]["maximum"] == 4


def test_a_model_that_is_not_there_ends_with_2_and_the_nearest_names(studio: Studio, capsys: Printed) -> None:
    assert main(["models", "flux", "--json"]) == 2
    assert "no 'flux'. The nearest: flux-1-1-pro, flux-kontext-pro." in json.loads(capsys.readouterr().out)["error"]
    assert main(["models", "imagin-4"]) == 2
    assert "The nearest: imagen-4" in capsys.readouterr().err
    assert main(["models", "qqqq"]) == 2
    assert "`prefect-eachlabs models` lists what there is" in capsys.readouterr().err
    assert main(["models", "../x"]) == 2
    assert "must be a model's slug" in capsys.readouterr().err


def test_the_catalogues_words_do_nothing_to_a_terminal() -> None:
    model = Model.parse({"slug": "m", "title": "\x1b]0;owned\x07", "request_schema": {"properties": {"a\n\x1b": {}}}})
    assert all(line.isprintable() for line in [_line(model), *_described(model)])


def test_fields_of_the_input_come_from_the_command_line(studio: Studio, capsys: Printed) -> None:
    words = ["generate", "a fox", "--to", studio.destination, "--model", "flux-1-1-pro", "--json"]
    assert main([*words, "--input", "seed=7", "--input", "aspect_ratio=16:9"]) == 0
    assert main([*words, "--input", "seed=NaN"]) == 2
    assert "input.seed: 'NaN' is not of type 'integer'" in capsys.readouterr().out.splitlines()[-1]
    (sent,) = studio.api.predictions()
    assert sent["input"] == {"prompt": "a fox", "seed": 7, "aspect_ratio": "16:9"}


def test_a_model_that_needs_no_prompt_gets_none(studio: Studio, tmp_path: Any, capsys: Printed) -> None:
    file = tmp_path / "fox.jpg"
    file.write_bytes(picture_bytes(1, "JPEG"))
    assert main(["generate", "--to", studio.destination, "--model", "upscaler", "--image-url", str(file)]) == 0
    assert main(["generate", "--to", studio.destination]) == 2
    assert "prompt: missing" in capsys.readouterr().err
    (sent,) = studio.api.predictions()
    assert set(sent["input"]) == {"image"}
