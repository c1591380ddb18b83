"""A model folder as a serverless SageMaker endpoint: costs nothing while idle, answers whole within 60 seconds.

    python sagemaker/sagemaker_serverless_endpoint_deployment.py --model runs/sample/best --bucket MY-BUCKET \\
        --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/victorian:latest --role arn:aws:iam::ACCOUNT:role/SageMaker
    python sagemaker/sagemaker_serverless_endpoint_deployment.py --delete

No GPU and no streaming: the relay's `buffered` mode sends the text in one piece. The token limit follows from the 60
seconds: measure the model's speed with `python generate.py`, a serverless CPU share is slower than a laptop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import sagemaker_endpoint_deployment as base  # noqa: E402
from ecr_images import SAGEMAKER, pinned  # noqa: E402

from cli import parse_flags, run_main  # noqa: E402
from config import ConfigError  # noqa: E402
from storage import s3  # noqa: E402

CALL_S = 60.0  # SageMaker's time limit for a serverless invocation
SPARE_S = 10.0  # reserved for the network and the prompt


class Flags(base.EndpointFlags):
    """A serverless endpoint: billed by the millisecond of use."""

    name: str = Field("victorian-serverless", pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,40}$")
    """Name of the endpoint."""
    memory_mb: Literal[1024, 2048, 3072, 4096, 5120, 6144] = 4096
    """Memory, and with it a share of CPUs; about three times the weights' size."""
    max_concurrency: int = Field(5, ge=1, le=200)
    """Requests at once; beyond it AWS answers with throttling."""
    provisioned: int = Field(0, ge=0, le=200)
    """Copies kept warm (billed all the time)."""
    tokens_per_s: float = Field(10.0, gt=0.0)
    """Tokens per second of this model on such a CPU; decides how many tokens a request may ask for."""


def token_limit(tokens_per_s: float) -> int:
    """Most tokens of a request that ends within SageMaker's 60 seconds."""
    return max(1, int((CALL_S - SPARE_S) * tokens_per_s))


def requests(flags: Flags, url: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls that make the endpoint: (operation, parameters) in order."""
    environment = {
        "VLG_SLOTS": "1",
        "VLG_MAX_TOKENS": str(min(100_000, token_limit(flags.tokens_per_s))),
        "VLG_DEADLINE_S": str(CALL_S - SPARE_S / 2),
    }
    model = base.model_request(flags, url, flags.image, environment)
    size: dict[str, int] = {"MemorySizeInMB": flags.memory_mb, "MaxConcurrency": flags.max_concurrency}
    if flags.provisioned:
        size["ProvisionedConcurrency"] = flags.provisioned
    config = base.config_request(flags, model["ModelName"], {"ServerlessConfig": size})
    return [("create_model", model), ("create_endpoint_config", config)]


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        flags = base.lower_case(parse_flags(Flags, argv, examples=__doc__))
        with s3.readable_errors(f"endpoint {flags.name}"):
            if flags.delete:
                return base.delete_all(flags)
            base.check(flags)
            if flags.provisioned > flags.max_concurrency:
                raise ConfigError(
                    [f"--provisioned {flags.provisioned} exceeds --max-concurrency {flags.max_concurrency}: lower it"]
                )
            if not flags.dry_run:
                ecr = base.service("ecr", flags)
                flags = flags.model_copy(update={"image": pinned(flags.image, ecr, SAGEMAKER)})
            calls = requests(flags, base.upload_model(flags, "own"))
            if flags.dry_run:
                print(json.dumps([{name: parameters} for name, parameters in calls], indent=2))
                return 0
            base.deploy_and_test(flags, calls, stream=False)
            print(base.usage(flags, "buffered", token_limit(flags.tokens_per_s)))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
