"""A Ray Serve of two replicas on this machine, in a process of its own, told what to do by lines.

kill        end one replica's process, as a crash would; answers when it is dead
scale N     have N replicas; answers when Ray has as many
running     answers how many replicas take requests
"""

import json
import os
import signal
import sys
from pathlib import Path

import ray
from ray import serve

from deploy.ray.app import Arguments, build


def deploy(folder: str, num_replicas: int) -> None:
    """Return when so many replicas are told to run, and the first time when they do."""
    arguments = Arguments(
        min_replicas=num_replicas,
        max_replicas=num_replicas,
        num_cpus=1,
        max_ongoing_requests=32,
        max_queued_requests=8,
        metrics_dir=folder,
        settings={"compare": False, "metrics_public": True},
    )
    serve.run(build(arguments), name="bitwatt", route_prefix="/")


def main() -> None:
    folder, port = sys.argv[1], int(sys.argv[2])
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=sys.argv[3],
        object_store_memory=100_000_000,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy(folder, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["kill"]:
                path = sorted(Path(folder).glob("*.json"))[0]
                os.kill(int(json.loads(path.read_text())[0]["labels"]["pid"]), signal.SIGKILL)
                print("killed", flush=True)
            case ["scale", count]:
                deploy(folder, int(count))
                print("told", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
