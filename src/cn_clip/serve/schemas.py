"""Requests and responses of the API, as in its OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Image = Annotated[
    str | dict[str, Any],
    Field(
        description="Base64 of an image file, a data: URI, or an object with one of these as "
        "`image`; a URL if the server fetches URLs.",
        examples=[{"image": "iVBORw0KGgo..."}],
    ),
]
ImageId = Annotated[int, Field(ge=1, lt=1 << 63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """A misspelt field is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class EmbeddingsRequest(BaseModel):
    """As OpenAI's; unknown fields are ignored, as clients send some."""

    input: str | list[str | dict[str, Any]] | list[int] | list[list[int]] | dict[str, Any] = Field(
        description='Texts; and images as data: URIs or objects such as {"image": BASE64}.',
        examples=["海边的日落"],
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Refused unless the model has as many.")
    user: str | None = None


class Embedding(BaseModel):
    """One embedding of unit length: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """As OpenAI's."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ClassifyRequest(_Strict):
    """Images to classify by labels, zero-shot."""

    images: list[Image] = Field(min_length=1)
    labels: list[str] = Field(min_length=2, examples=[["猫", "狗", "火箭"]])
    templates: list[str] = Field(["{}"], min_length=1, examples=[["一张{}的照片"]])
    top: int | None = Field(None, ge=1, description="Labels per image; all by default.")
    model: str | None = None


class Prediction(BaseModel):
    """A label: softmax over the given labels, and the cosine, which is independent of them."""

    label: str
    probability: float
    cosine: float


class ImageError(BaseModel):
    """Why an image was refused."""

    message: str


class Classified(BaseModel):
    """The labels of an image, the best first; or its error."""

    index: int
    predictions: list[Prediction] | None = None
    error: ImageError | None = None


class ClassifyResponse(BaseModel):
    """One entry per image."""

    model: str
    logit_scale: float
    data: list[Classified]


class SimilarityRequest(_Strict):
    """Texts and images to compare."""

    texts: list[str] = Field(min_length=1, examples=[["猫", "狗"]])
    images: list[Image] = Field(
        default=[], description="Without any, the texts are compared with each other."
    )
    model: str | None = None


class SimilarityResponse(BaseModel):
    """Cosines and softmax over the texts, one row per image; null for an unreadable one."""

    model: str
    logit_scale: float
    cosines: list[list[float] | None]
    probabilities: list[list[float] | None]
    errors: dict[str, str]


class SearchFilters(_Strict):
    """Conditions that all results meet."""

    folder: str | None = Field(
        None, description="As in `path` of a result.", examples=["photos/2024"]
    )
    after: str | None = Field(None, examples=["2024-05"])
    before: str | None = Field(None, examples=["2024"])
    min_side: int | None = Field(None, ge=0, lt=1 << 31)
    min_bytes: int | None = Field(None, ge=0, lt=1 << 62)
    max_bytes: int | None = Field(None, ge=0, lt=1 << 62)
    caption: str | None = Field(None, max_length=1000)
    text: str | None = Field(None, max_length=1000)


class SearchRequest(_Strict):
    """A search by text, by images, by images of the library, or by all of these together."""

    query: str = Field("", examples=["2:猫 -室内"])
    images: list[Image] = Field(default=[], max_length=16)
    like: list[ImageId] = Field(default=[], max_length=64)
    k: int = Field(20, ge=1, lt=1 << 31)
    offset: int = Field(0, ge=0, lt=1 << 31)
    filters: SearchFilters | None = None


class Found(BaseModel):
    """A result. `image` and `thumbnail` are paths on this server."""

    id: int
    path: str
    cosine: float
    probability: float | None
    matches: bool
    why: list[str]
    caption: str | None
    text: str | None
    taken: str | None
    width: int
    height: int
    copies: list[str]
    image: str
    thumbnail: str


class SearchResponse(BaseModel):
    """Results, the best first. With `nothing_matches`, they are only the nearest."""

    query: str
    images: int
    nothing_matches: bool
    more: bool
    hits: list[Found]


class MissingPart(BaseModel):
    """A part whose images are missing from an answer."""

    part: int
    reason: str


class PartsState(BaseModel):
    """Which of the parts answered; they are numbered from 1."""

    asked: int
    answered: int
    missing: list[MissingPart]


class MergedResponse(SearchResponse):
    """Results of several servers, each with a part of the images."""

    parts: PartsState


class RootState(BaseModel):
    """A folder or source of the library."""

    name: str
    files: int


class LibraryResponse(BaseModel):
    """The state of the library; `index` has the counts of the last index run."""

    name: str
    images: int
    unreadable: int
    model: str | None
    roots: list[RootState]
    may_index: bool
    index: dict[str, Any] | None


class KnnRequest(BaseModel):
    """As clip-retrieval's; unknown fields are ignored, as its clients send many."""

    text: str | None = None
    image: str | None = None
    image_url: str | None = None
    embedding_input: list[Finite] | None = None
    modality: str = "image"
    num_images: int = Field(40, ge=1, le=1000)
    num_result_ids: int | None = None
    indice_name: str | None = None


class KnnResult(BaseModel):
    """As clip-retrieval's."""

    id: int
    similarity: float
    caption: str | None = None
    url: str | None = None


class ModelCard(BaseModel):
    """A model; the fields of OpenAI, and those of this one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cn-clip"
    dim: int | None = None
    context_length: int | None = None
    logit_scale: float | None = None
    precision: str | None = None
    fingerprint: str | None = None


class ModelsResponse(BaseModel):
    """The model of this server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoginRequest(_Strict):
    """An API key, for a session of the page."""

    key: str = Field(max_length=1000)


class Problem(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """In the shape of OpenAI's API."""

    error: Problem
