"""What clients send. Fields that are not known are refused; bounds that the config sets are checked by the service."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

EXAMPLE_IMAGE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEX/////AADrWueTAAAAJklEQVR42mNggAHmA0wsCkwcAkwC"
    "HEwMDFD04QfTjw9Mfx7AVQEAdUIG1racT0IAAAAASUVORK5CYII="
)


def _encodable(text: str) -> str:
    text.encode()  # a lone surrogate is no text; its UnicodeEncodeError is a ValueError
    return text


def _image_url(url: str) -> str:
    if re.match(_IMAGE_URL, url, re.ASCII) is None:
        raise ValueError("no data URL of an image (data:image/png;base64,…), and no https URL")
    if url.startswith(REMOTE) and len(url) > _LONGEST_URL:
        raise ValueError(f"a URL has {len(url)} characters, more than {_LONGEST_URL}, which is the limit")
    return url


REMOTE = "https://"
_IMAGE_URL = r"^(data:image/[a-zA-Z0-9.+-]+;base64,|https://)"
_LONGEST_URL = 2000
Text = Annotated[str, AfterValidator(_encodable)]
ImageSource = Annotated[
    str,
    AfterValidator(_encodable),
    AfterValidator(_image_url),
    Field(
        json_schema_extra={"pattern": _IMAGE_URL},
        description="`data:image/png;base64,…`: PNG, JPEG, WebP, GIF, BMP, TIFF or PPM; or, of hosts that the service "
        "lists in `limits.image_hosts`, an https URL.",
        examples=[EXAMPLE_IMAGE],
    ),
]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Base of all: no unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(Strict):
    """Where an image part has its image."""

    url: ImageSource
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Strict):
    """Words of a message."""

    type: Literal["text"]
    text: Text


class UserMessage(Strict):
    """The one turn of a conversation: images and a question about them."""

    role: Literal["user"]
    content: list[Annotated[ImagePart | TextPart, Field(discriminator="type")]] = Field(min_length=1, max_length=256)
    name: Text | None = None


class StreamOptions(Strict):
    """OpenAI's."""

    include_usage: bool = False


class VisualLatentsOptions(Strict):
    """What only this service knows."""

    swap: Literal["none", "noise", "other_image"] = Field(
        "none",
        description="noise: latents of the same lengths that say nothing; other_image: those of the service's example.",
    )
    evidence: bool = Field(False, description="Log-probability of the answer under every anchor, attention map as PNG.")


class ChatRequest(Strict):
    """OpenAI's chat completion: one user message with images and a question."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "A",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}},
                                {"type": "text", "text": "what color is the circle?"},
                            ],
                        }
                    ],
                    "visual_latents": {"evidence": True},
                }
            ]
        },
    )

    model: Text = Field(description="An anchor's name, or `joint`; see /v1/models.")
    messages: list[UserMessage] = Field(min_length=1, max_length=1)
    temperature: Finite = Field(0.0, ge=0, le=2, description="0, the default, is greedy.")
    top_p: Finite = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, description="Default and limit: `limits.max_tokens` of the service.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = Field(None, description="At most four texts that end an answer.")
    n: int = Field(1, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    visual_latents: VisualLatentsOptions = VisualLatentsOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """As a tuple, whatever form it came in."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _stops_are_few(self) -> ChatRequest:
        if len(self.stops) > 4 or any(not 0 < len(stop) <= 200 for stop in self.stops):
            raise ValueError("stop: at most 4 texts of 1 to 200 characters")
        return self


class LatentsRequest(Strict):
    """Images whose latents are wanted."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"images": [EXAMPLE_IMAGE]}]})

    images: list[ImageSource] = Field(min_length=1, description="Each gives latents of its own.")
    format: Literal["base64", "list"] = Field("base64", description="list: nested lists, for few numbers.")


class EncodedLatents(Strict):
    """Latents (K, D): float32, little-endian, row by row, in base64."""

    dtype: Literal["float32"]
    shape: tuple[int, int]
    data: str


class QuestionAnswer(Strict):
    """What is scored."""

    question: Text
    answer: Text


class ScoreEntry(Strict):
    """One image, or its latents, with questions about it."""

    image: ImageSource | None = None
    latents: EncodedLatents | list[list[Finite]] | None = Field(None, description="As /v1/latents gives them.")
    questions: list[QuestionAnswer] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_source(self) -> ScoreEntry:
        if (self.image is None) == (self.latents is None):
            raise ValueError("give either image or latents")
        return self


class ScoreRequest(Strict):
    """Answers whose probability is wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "entries": [
                        {
                            "image": EXAMPLE_IMAGE,
                            "questions": [{"question": "what color is the circle?", "answer": "red"}],
                        }
                    ]
                }
            ]
        },
    )

    entries: list[ScoreEntry] = Field(min_length=1)
    anchors: list[Text] | None = Field(None, min_length=1, description="By default all.")


class ErrorDetail(BaseModel):
    """See `ErrorResponse`."""

    message: str
    type: str
    code: str
    request_id: str


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


def described(errors: Any) -> str:
    """Which fields are wrong and why, without what was sent: it may be an image."""
    parts = []
    for item in list(errors)[:5]:
        field = ".".join(str(part)[:60] for part in item["loc"] if part != "body") or "body"
        parts.append(f"{field}: {item['msg'].removeprefix('Value error, ')[:200]}")
    return "; ".join(parts)
