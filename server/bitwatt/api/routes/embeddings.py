"""POST /v1/embeddings."""

import asyncio
import sys
import time
from array import array
from base64 import b64encode
from contextlib import aclosing
from secrets import token_hex
from typing import cast

import msgspec
from fastapi import APIRouter, Request, Response

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import (
    ChargeOf,
    KeySalt,
    Models,
    SettingsOf,
    WantsEnergy,
    name_ignored_fields,
    refuse_priority,
)
from bitwatt.api.energy_forms import EnergyForms
from bitwatt.api.json_route import JsonRoute, json_response
from bitwatt.api.schemas.embeddings import Embedding, EmbeddingBody, EmbeddingList
from bitwatt.engine.messages import EngineInfo
from bitwatt.serving.embedding import EmbeddingRequest
from bitwatt.text.processor import TextProcessor

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingBody,
    request: Request,
    models: Models,
    settings: SettingsOf,
    key_salt: KeySalt,
    charge: ChargeOf,
    wants_energy: WantsEnergy,
) -> Response:
    """Embed each input: the last hidden state of its last token, of length 1."""
    refuse_priority(body.priority, settings)
    headers = name_ignored_fields(request, body)
    model = models.find(body.model)

    async def encode(text: TextProcessor, info: EngineInfo) -> list[list[int]]:
        prompts: list[list[int]] = []
        for prompt in body.input:
            if not isinstance(prompt, str):
                prompts.append(prompt)
                continue
            await asyncio.sleep(0)  # there may be thousands, and others have a turn between two
            token_ids = await text.encode(
                prompt,
                max_tokens=info.max_model_len,
                add_special_tokens=body.add_special_tokens is not False,
                param="input",
            )
            prompts.append(token_ids)
        return prompts

    asked = EmbeddingRequest(
        request_id=f"embd-{token_hex(12)}",
        encode=encode,
        dimensions=body.dimensions,
        key_salt=key_salt,
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
    )
    put = _as_base64 if body.encoding_format == "base64" else _as_numbers
    data: list[msgspec.Raw] = []
    async with tied_to_client(request.receive, timeout_s=settings.request_timeout):
        embeddings = await asked.for_model(model)
        async with aclosing(embeddings.stream(charge)) as vectors:
            async for vector in vectors:
                # Encoded one by one: all at once would hold up everyone else.
                entry = Embedding(index=len(data), embedding=put(vector))
                data.append(msgspec.Raw(msgspec.json.encode(entry)))
                await asyncio.sleep(0)
    whole = EmbeddingList(
        id=asked.request_id,
        created=int(time.time()),
        model=model.name,
        data=cast("list[Embedding]", data),  # each is encoded already
        usage=embeddings.usage,
    )
    if not wants_energy:
        return json_response(whole, headers=headers)
    forms = EnergyForms(embeddings.energy, settings.prices)
    return json_response(forms.within(whole), headers=headers | forms.headers())


def _as_numbers(vector: bytes) -> list[float]:
    return array("f", vector).tolist()


def _as_base64(vector: bytes) -> str:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(numbers.tobytes()).decode()
