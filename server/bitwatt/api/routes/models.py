"""GET /v1/models."""

from typing import Literal

import msgspec
from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

from bitwatt.api.dependencies import Models
from bitwatt.api.json_route import json_response
from bitwatt.serving.models import ServedModel

__all__ = ["router"]

router = APIRouter()


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model; null where its engine has not said yet.

    root       what its files are called, as vLLM has it: a folder, a GGUF file, or ORG/NAME
    default_sampling_params  what stands where a request is silent, besides the API's own defaults
    quantized  where --quantize made its ternary weights of dense ones: what that means
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["bitwatt"] = "bitwatt"
    root: str
    max_model_len: int | None
    weights: str | None
    dtype: str | None
    quantized: str | None
    default_sampling_params: dict[str, float]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every model served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def _card(model: ServedModel) -> ModelCard:
    info = model.engine.info
    return ModelCard(
        id=model.name,
        created=model.created,
        root=model.root or model.name,
        max_model_len=None if info is None else info.max_model_len,
        weights=None if info is None else info.weights,
        dtype=None if info is None else info.dtype,
        quantized=None if info is None else info.quantized,
        default_sampling_params=dict(model.sampling_defaults),
    )


@router.get("/v1/models")
async def list_models(models: Models) -> Response:
    """List what is served."""
    return json_response(ModelList(data=[_card(model) for model in models.by_name.values()]))


@router.get("/v1/models/{name:path}")
async def get_model(name: str, models: Models) -> Response:
    """Describe one model."""
    if not name:
        raise HTTPException(404)
    return json_response(_card(models.find(name)))
