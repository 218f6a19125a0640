"""GET /health, /ready, /version and /metrics: for load balancers, probes and Prometheus."""

from fastapi import APIRouter, Request, Response

from bitwatt import __version__
from bitwatt.api.dependencies import Models
from bitwatt.api.json_route import json_response
from bitwatt.telemetry.metrics import Metrics

__all__ = ["router"]

router = APIRouter()


@router.get("/health")
async def health(models: Models) -> Response:
    """Answer 200 while no engine is down; one that still loads is not down."""
    states = {name: model.state for name, model in models.by_name.items()}
    is_healthy = "down" not in states.values()
    status = "ok" if is_healthy else "unhealthy"
    return json_response({"status": status, "models": states}, 200 if is_healthy else 503)


@router.get("/ready")
async def ready(models: Models) -> Response:
    """Answer 200 once every engine takes requests, else 503 with those that don't."""
    waiting = {
        name: model.state for name, model in models.by_name.items() if model.state != "ready"
    }
    if waiting:
        return json_response({"status": "not ready", "waiting_for": waiting}, 503)
    return json_response({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """Return the server's version."""
    return json_response({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return every series, in Prometheus's text format."""
    registry: Metrics = request.app.state.metrics
    body, content_type = registry.render()
    return Response(body, headers={"content-type": content_type})
