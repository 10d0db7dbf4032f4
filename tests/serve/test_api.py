"""The API: embeddings as OpenAI's client asks, classification, similarity, search, images."""

import base64
import io
import json
import re
import time

import httpx
import numpy as np
import pytest
from conftest import TINY, encoded, make_image, make_model
from openai import OpenAI
from PIL import Image
from serve.servers import Settings, body, make_library, photo, serving

from cn_clip import load, weights
from cn_clip.cli import run
from cn_clip.serve import model_routes
from cn_clip.zeroshot import classify


@pytest.fixture(scope="module")
def library(tmp_path_factory, tiny_checkpoint):
    return make_library(tmp_path_factory.mktemp("served"), tiny_checkpoint)


@pytest.fixture(scope="module")
def server(library):
    with serving(Settings(library=str(library), image_batch=4, max_results=50)) as client:
        yield client


@pytest.fixture(scope="module")
def embedder(tiny_checkpoint):
    return load(tiny_checkpoint)


def data_uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


PICTURE = encoded(make_image(3), "PNG")


@pytest.fixture
def openai(server):
    with httpx.Client(trust_env=False) as http:
        yield OpenAI(base_url=f"{server.base_url}/v1", api_key="none", http_client=http)


def test_the_openai_client_at_its_defaults_gets_the_embeddings_of_the_library(openai, embedder):
    texts = ["海边的日落", "一只猫", "海边的日落"]
    answer = openai.embeddings.create(model=embedder.name, input=texts)
    got = np.array([item.embedding for item in answer.data], np.float32)
    np.testing.assert_allclose(got, embedder.embed_texts(texts), atol=1e-5)
    assert [item.index for item in answer.data] == [0, 1, 2]
    tokens = sum(len(ids) for ids in embedder.prepare_texts(texts))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    assert [model.id for model in openai.models.list()] == [embedder.name]


def test_floats_and_base64_are_the_same_little_endian_float32(server):
    answers = [
        server.post("/v1/embeddings", json={"input": "猫", "encoding_format": kind})
        for kind in ("float", "base64")
    ]
    floats, text = (answer.json()["data"][0]["embedding"] for answer in answers)
    exact = np.frombuffer(base64.b64decode(text), "<f4")
    assert np.array_equal(np.float32(floats), exact)
    np.testing.assert_allclose(floats, exact, rtol=1e-7, atol=1e-12)
    written = re.findall(r"-?\d[^,\]}]*", answers[0].text.partition('"embedding":[')[2])
    digits = [re.sub(r"[eE].*|\D", "", each).lstrip("0") for each in written[: len(floats)]]
    assert max(map(len, digits)) <= 9


def test_numbers_of_any_size_keep_the_value_of_a_float32():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], np.float32([0, -0.0, 1, -1, 1e-45, 0.1])])
    ordinary = values[np.abs(values) < 2]
    assert np.array_equal(np.float32(model_routes._numbers(ordinary)), ordinary)


def test_images_and_texts_mix_in_one_request(server, embedder):
    plain = base64.b64encode(PICTURE).decode()
    inputs = [
        "猫",
        data_uri(PICTURE),
        {"image": plain},
        {"image": plain.rstrip("=").replace("+", "-").replace("/", "_")},
        {"type": "image_url", "image_url": {"url": data_uri(PICTURE)}},
        {"type": "text", "text": "狗"},
    ]
    answer = server.post("/v1/embeddings", json={"input": inputs})
    assert answer.status_code == 200, answer.text
    got = np.array([item["embedding"] for item in answer.json()["data"]])
    image = embedder.embed_images(PICTURE)[0]
    text = embedder.embed_texts(["猫", "狗"])
    expected = np.stack([text[0], image, image, image, image, text[1]])
    np.testing.assert_allclose(got, expected, atol=1e-5)


BAD = {
    "not JSON": (b"{", 400),
    "not UTF-8": ('{"input": "\udcff"}'.encode("utf-8", "surrogateescape"), 400),
    "no input": ({}, 400),
    "empty list": ({"input": []}, 400),
    "empty text": ({"input": ["猫", " "]}, 400),
    "token ids": ({"input": [1, 2, 3]}, 400),
    "lists of token ids": ({"input": [[1, 2, 3]]}, 400),
    "dimensions": ({"input": "猫", "dimensions": 7}, 400),
    "unknown model": ({"input": "猫", "model": "gpt"}, 404),
    "10,000 texts": ({"input": ["猫"] * 10_000}, 400),
    "long text": ({"input": "猫" * 30_000}, 400),
    "not base64": ({"input": [{"image": "%%%"}]}, 400),
    "not an image": ({"input": [{"image": base64.b64encode(b"text").decode()}]}, 400),
    "URL": ({"input": [{"image": "http://127.0.0.1/x.png"}]}, 400),
    "encoding": ({"input": "猫", "encoding_format": "hex"}, 400),
    "array": ([], 400),
    "deep": (b"[" * 100_000, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_one_sentence(server, name):
    values, status = BAD[name]
    answer = server.post("/v1/embeddings", **body(values))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 300


def test_half_an_emoji_is_a_replaced_character(server, embedder):
    answer = server.post("/v1/embeddings", **body(b'{"input": "\\ud83d\\u732b"}'))
    got = answer.json()["data"][0]["embedding"]
    np.testing.assert_allclose(got, embedder.embed_texts("\ufffd猫")[0], atol=1e-5)


def test_one_bad_image_is_named_and_the_server_goes_on(server):
    inputs = [data_uri(PICTURE), {"image": base64.b64encode(PICTURE[:200]).decode()}]
    answer = server.post("/v1/embeddings", json={"input": inputs})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input[1]"
    assert server.post("/v1/embeddings", json={"input": inputs[:1]}).status_code == 200
    assert server.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("accepted", "chinese"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", True),
        ("fr, zh-TW; q=0.3", True),
        ("en-GB,zh;q=0.5", False),
        ("zh;q=0, ../../zh", False),
        ("fr", False),  # the server's own
        ("", False),
    ],
)
def test_errors_are_in_the_language_that_the_client_accepts(server, accepted, chinese):
    headers = {"accept-language": accepted}
    broken = {"image": base64.b64encode(PICTURE[:200]).decode()}  # read in another thread
    answers = [
        server.post("/v1/embeddings", content=b"{", headers=headers),
        server.post("/v1/embeddings", json={"input": [broken]}, headers=headers),
        server.get("/v1/images/999999", headers=headers),
        server.post("/v1/search", json={}, headers=headers | {"sec-fetch-site": "cross-site"}),
    ]
    for answer in answers:
        message = answer.json()["error"]["message"]
        assert answer.is_client_error and bool(re.search("[一-鿿]", message)) == chinese, message


def test_an_image_bomb_is_refused_before_it_is_decoded(server):
    bomb = io.BytesIO()
    Image.new("1", (8_500, 8_500)).save(bomb, "PNG")
    answer = server.post("/v1/embeddings", json={"input": [data_uri(bomb.getvalue())]})
    assert answer.status_code == 400 and "above the limit" in answer.json()["error"]["message"]


def test_classification_is_that_of_the_package_and_a_bad_image_fails_alone(server, embedder):
    labels = ["猫", "狗", "火箭", "猫"]
    answer = server.post(
        "/v1/classify",
        json={
            "images": [data_uri(PICTURE), "%%%"],
            "labels": labels,
            "templates": ["一张{}的照片", "{}"],
            "top": 2,
        },
    ).json()
    with pytest.warns(UserWarning, match="more than once"):
        expected = classify(embedder, PICTURE, labels, templates=["一张{}的照片", "{}"])
    good, bad = answer["data"]
    assert [p["label"] for p in good["predictions"]] == [p[0] for p in expected.top(2)[0]]
    for got, (_label, probability, cosine) in zip(
        good["predictions"], expected.top(2)[0], strict=True
    ):
        assert got["probability"] == pytest.approx(probability, abs=1e-4)
        assert got["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert "base64" in bad["error"]["message"] and bad.get("predictions") is None


def test_similarity_is_a_table_of_cosines(server, embedder):
    texts = ["猫", "狗"]
    request = {"texts": texts, "images": [data_uri(PICTURE), "%%%"]}
    answer = server.post("/v1/similarity", json=request).json()
    cosines = embedder.embed_texts(texts) @ embedder.embed_images(PICTURE)[0]
    np.testing.assert_allclose(answer["cosines"][0], cosines, atol=1e-5)
    logits = np.exp(embedder.logit_scale * cosines)
    np.testing.assert_allclose(answer["probabilities"][0], logits / logits.sum(), atol=1e-4)
    assert answer["cosines"][1] is None and "1" in answer["errors"]
    alone = server.post("/v1/similarity", json={"texts": texts}).json()
    np.testing.assert_allclose(np.diag(alone["cosines"]), [1, 1], atol=1e-5)


def test_a_search_for_an_image_of_the_library_finds_it_first(server):
    content = base64.b64encode(photo(3)).decode()
    answer = server.post("/v1/search", json={"images": [content], "k": 3}).json()
    first = answer["hits"][0]
    assert first["path"] == "photos/sub/3.jpg" and first["cosine"] > 0.99
    assert answer["images"] == 6 and len(answer["hits"]) == 3 and answer["more"]
    like = server.get(f"/v1/search?like={first['id']}&k=1").json()
    assert like["hits"][0]["id"] == first["id"]


def test_pages_of_results_are_parts_of_one_ranking(server):
    whole = server.get("/v1/search", params={"q": "海", "k": 6}).json()
    pages = [
        server.get("/v1/search", params={"q": "海", "k": 2, "offset": offset}).json()
        for offset in (0, 2, 4)
    ]
    assert [h["id"] for p in pages for h in p["hits"]] == [h["id"] for h in whole["hits"]]
    assert [p["more"] for p in pages] == [True, True, False]


def test_filters_take_the_paths_that_results_have(server):
    request = {"query": "海", "filters": {"folder": "photos/sub"}}
    answer = server.post("/v1/search", json=request).json()
    assert sorted(h["path"] for h in answer["hits"]) == [f"photos/sub/{n}.jpg" for n in (1, 3, 5)]
    request["filters"] = {"after": "2024-05-03", "before": "2024-05-04"}
    answer = server.post("/v1/search", json=request).json()
    assert {h["taken"][:10] for h in answer["hits"]} == {"2024-05-03", "2024-05-04"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/search", 400),
        ("/v1/search?q=x&k=0", 400),
        ("/v1/search?q=x&k=51", 400),
        ("/v1/search?q=x&k=9999999999999999999999", 400),
        ("/v1/search?like=99", 400),
        ("/v1/search?q=x&folder=elsewhere", 400),
        ("/v1/search?q=x&folder=photos/../../etc", 400),
        ("/v1/search?q=x&folder=/etc", 400),
        ("/v1/search?q=x&folder=photos%00", 400),
        ("/v1/search?q=x&after=soon", 400),
        ("/v1/search?q=x&before=9999-13", 400),
        ("/v1/images/0", 400),
        ("/v1/images/99", 404),
        ("/v1/images/99999999999999999999", 400),
        ("/v1/images/..%2f..%2fetc%2fpasswd", 404),
        ("/v1/images/1/thumbnail/../../../library.db", 404),
        ("/v1/images/1?side=1", 400),
        ("/v1/images/1?original=true", 403),
        ("/static/../app.py", 404),
        ("/static/%2e%2e/app.py", 404),
        ("/nothing", 404),
        ("/docs", 404),
    ],
)
def test_a_bad_path_is_refused(server, path, status):
    answer = server.get(path)
    assert answer.status_code == status, answer.text
    assert "message" in answer.json()["error"]


def test_nan_in_json_is_refused(server):
    answer = server.post("/knn-service", **body(b'{"embedding_input": [NaN]}'))
    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["", "/thumbnail"])
def test_served_images_have_pixels_and_nothing_else(server, library, path):
    number = server.get("/v1/search?q=x&k=1").json()["hits"][0]["id"]
    answer = server.get(f"/v1/images/{number}{path}")
    assert answer.status_code == 200 and b"SECRET" not in answer.content
    with Image.open(io.BytesIO(answer.content)) as image:
        assert not image.getexif() and not image.info.get("comment")
        assert image.size == (60, 80)  # turned as the camera said
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = server.get(
        f"/v1/images/{number}{path}", headers={"if-none-match": answer.headers["etag"]}
    )
    assert again.status_code == 304 and not again.content


def test_results_do_not_show_where_the_library_is(server, library):
    text = server.get("/v1/search?q=x").text + server.get("/v1/library").text
    assert str(library.parent) not in text


def test_clients_of_clip_retrieval_find_images(server, library):
    request = {
        "text": None,
        "image": base64.b64encode(photo(2)).decode(),
        "image_url": None,
        "embedding_input": None,
        "modality": "image",
        "num_images": 2,
        "num_result_ids": 2,
        "indice_name": "library",
        "use_mclip": False,
        "deduplicate": True,
        "use_safety_model": True,
        "use_violence_detector": True,
        "aesthetic_score": 9,
        "aesthetic_weight": 0.5,
    }
    hits = server.post("/knn-service", json=request).json()
    found = server.post("/v1/search", json={"images": [request["image"]], "k": 2}).json()
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in found["hits"]]
    assert server.get("/indices-list").json() == ["library"]
    vector = server.post("/v1/embeddings", json={"input": "猫"}).json()["data"][0]["embedding"]
    by_vector = server.post("/knn-service", json={"embedding_input": vector}).json()
    by_text = server.post("/knn-service", json={"text": "猫"}).json()
    assert [hit["id"] for hit in by_vector] == [hit["id"] for hit in by_text]


def test_metrics_count_requests_and_batches(server):
    server.post("/v1/embeddings", json={"input": "计数"})
    text = server.get("/metrics").text
    assert 'cnclip_requests_total{method="POST",route="/v1/embeddings",status="200"}' in text
    assert 'cnclip_batch_items_count{tower="texts"}' in text


def test_the_openapi_description_has_every_body_and_no_422(server):
    description = server.get("/openapi.json").json()
    assert "422" not in json.dumps(description)
    for path in ("/v1/embeddings", "/v1/classify", "/v1/search", "/knn-service", "/login"):
        schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = schema["schema"]["$ref"].rpartition("/")[2]
        assert description["components"]["schemas"][name]["properties"]


def test_a_library_deleted_under_the_server_is_a_503(tmp_path, tiny_checkpoint):
    import shutil

    library = make_library(tmp_path, tiny_checkpoint, 2)
    with serving(Settings(library=str(library), image_batch=1)) as client:
        assert client.get("/readyz").status_code == 200
        shutil.rmtree(library)
        answer = client.get("/v1/search?q=x")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "library_gone"
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/embeddings", json={"input": "猫"}).status_code == 200


def test_a_server_without_a_library_says_so(tiny_checkpoint):
    with serving(Settings(model=str(tiny_checkpoint), image_batch=1)) as client:
        answer = client.get("/v1/search?q=x")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_library"
        assert client.post("/v1/embeddings", json={"input": "猫"}).status_code == 200


def test_an_idle_model_is_unloaded_and_comes_back(tiny_checkpoint):
    settings = Settings(model=str(tiny_checkpoint), image_batch=1, unload_after=0.1)
    with serving(settings) as client:
        first = client.post("/v1/embeddings", json={"input": "猫"}).json()
        deadline = time.monotonic() + 5
        while client.service.is_loaded and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not client.service.is_loaded
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/models").status_code == 200 and not client.service.is_loaded
        assert client.post("/v1/embeddings", json={"input": "猫"}).json() == first


def test_a_client_that_leaves_while_the_model_is_loaded_does_not_lose_it(tiny_checkpoint):
    settings = Settings(model=str(tiny_checkpoint), image_batch=1, unload_after=0.2)
    with serving(settings) as client:
        service, loaded = client.service, []
        load_now = service._load

        def load_slowly(stored):
            loaded.append(stored)
            time.sleep(0.6)
            return load_now(stored)

        service._load = load_slowly
        while service.is_loaded:
            time.sleep(0.05)
        for _attempt in range(3):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/embeddings", json={"input": "猫"}, timeout=0.1)
        assert client.post("/v1/embeddings", json={"input": "猫"}).status_code == 200
        assert len(loaded) == 1


def test_clients_of_clip_retrieval_get_the_model_that_the_library_has_now(
    tmp_path, tiny_checkpoint
):
    library = make_library(tmp_path, tiny_checkpoint, 3)
    weights.save_folder(make_model(TINY["vit"], seed=1), other := tmp_path / "other")
    with serving(Settings(library=str(library), image_batch=1)) as client:
        before = client.post("/knn-service", json={"text": "猫", "num_images": 3}).json()
        assert run(["index", "--library", str(library), "--model", str(other)]) == 0
        after = client.post("/knn-service", json={"text": "猫", "num_images": 3}).json()
        found = client.get("/v1/search?q=猫&k=3").json()["hits"]
        cosines = {hit["id"]: hit["cosine"] for hit in found}
        assert before != after and {hit["id"] for hit in after} == set(cosines)
        for hit in after:
            assert hit["similarity"] == pytest.approx(cosines[hit["id"]], abs=1e-3)
