"""Presigned uploads at the emulator: exactly the required headers, 15 minutes, 100 MB."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_eachlabs.testing.emulator import uploads as upload_shelf
from tests.testing.test_emulator import Api


def presigned(api: Api, content_type: str = "image/png") -> dict[str, Any]:
    answer = api.call("POST", "/v1/upload/presign", json={"content_type": content_type, "file_type": "image"})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def put(api: Api, url: str, body: bytes, headers: dict[str, str]) -> int:
    api.headers = {}
    return api.call("PUT", url, content=body, headers=headers).status_code


def test_an_upload_is_served_at_its_public_url() -> None:
    api = Api()
    upload = presigned(api)
    assert api.call("GET", upload["public_url"]).status_code == 404
    assert put(api, upload["presigned_url"], b"bytes", upload["required_headers"]) == 200
    served = api.call("GET", upload["public_url"])
    assert (served.content, served.headers["content-type"]) == (b"bytes", "image/png")
    assert (api.tallies()["uploads"], api.tallies()["uploaded_more_than_once"]) == (1, {})


def test_the_required_headers_are_wanted_exactly() -> None:
    api = Api()
    upload = presigned(api)
    good = upload["required_headers"]
    url = upload["presigned_url"]
    wrong: list[dict[str, str]] = [
        {},
        {name: value for name, value in good.items() if name != "x-amz-meta-file-id"},
        {**good, "x-amz-meta-file-id": "other"},
        {**good, "content-type": "image/jpeg"},
        {**good, "x-amz-acl": "public-read"},
    ]
    assert [put(api, url, b"x", headers) for headers in wrong] == [403] * 5
    assert put(api, url, b"x", {**good, "authorization": "Bearer k"}) == 400
    assert put(api, url.replace("Signature=", "Signature=0"), b"x", good) == 403
    assert put(api, url, b"x", good) == 200
    assert api.tallies()["uploads"] == 1
    assert api.tallies()["violations"] == {"key_sent_to_a_file_host": 1}


def test_a_presigned_url_is_good_for_15_minutes() -> None:
    api = Api()
    upload = presigned(api)
    api.clock.time += 15 * 60
    assert put(api, upload["presigned_url"], b"x", upload["required_headers"]) == 200
    api.clock.time += 1
    assert put(api, upload["presigned_url"], b"x", upload["required_headers"]) == 403


def test_an_upload_at_the_cap_is_taken_and_one_byte_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_eachlabs.testing.emulator.files.MAX_UPLOAD_BYTES", 1_000)
    api = Api()
    upload = presigned(api)
    assert put(api, upload["presigned_url"], bytes(1_001), upload["required_headers"]) == 400
    assert put(api, upload["presigned_url"], bytes(1_000), upload["required_headers"]) == 200


def test_the_same_file_uploaded_twice_is_seen() -> None:
    api = Api()
    for _ in range(2):
        api.headers = {"X-API-Key": "k"}
        upload = presigned(api)
        put(api, upload["presigned_url"], b"same", upload["required_headers"])
    assert list(api.tallies()["uploaded_more_than_once"].values()) == [2]


def test_uploads_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_shelf, "_MAX_KEPT_BYTES", 10)
    shelf = upload_shelf.UploadShelf()
    first, second = shelf.presign("image/png", 0), shelf.presign("image/png", 0)
    shelf.receive(first, bytes(6))
    shelf.receive(second, bytes(6))
    assert shelf.get(first.id) is None
    assert shelf.get(second.id) is second


def test_a_reference_that_was_never_uploaded_fails_the_prediction() -> None:
    api = Api()
    upload = presigned(api)
    order = {"model": "gemini", "input": {"prompt": "a fox", "image_url": upload["public_url"]}}
    bad = api.call("POST", "/v1/prediction", json=order).json()["predictionID"]
    put(api, upload["presigned_url"], b"x", upload["required_headers"])
    api.headers = {"X-API-Key": "k"}
    good = api.call("POST", "/v1/prediction", json=order).json()["predictionID"]
    api.clock.time += 20
    assert api.get(bad)["output"]["classification"]["category"] == "invalid_user_input"
    assert api.get(good)["status"] == "success"
    assert api.tallies()["violations"] == {"reference_not_uploaded": 1}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"content_type": 5},
        {"content_type": "png"},
        {"content_type": "image/png", "file_type": "picture"},
        {"content_type": "image/png", "expires_in_seconds": "soon"},
    ],
    ids=str,
)
def test_a_wrong_presign_request_is_a_400(body: dict[str, Any]) -> None:
    assert Api().call("POST", "/v1/upload/presign", json=body).status_code == 400


def test_a_deleted_file_is_gone() -> None:
    api = Api()
    upload = presigned(api)
    put(api, upload["presigned_url"], b"x", upload["required_headers"])
    api.headers = {"X-API-Key": "k"}
    assert [api.call("DELETE", f"/v1/files/{upload['id']}").status_code for _ in range(2)] == [204, 204]
    assert api.call("GET", upload["public_url"], headers={"X-API-Key": ""}).status_code == 404
    assert api.call("DELETE", "/v1/files/no-uuid").status_code == 400


def test_the_upload_cap_is_100_megabytes() -> None:
    assert upload_shelf.MAX_UPLOAD_BYTES == 100_000_000
