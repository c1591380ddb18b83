"""Deploys, updates and deletes the WebSocket gateway in an AWS account. Needs only boto3, and Docker for a model in Lambda.

    python lambda/deploy_relay.py --bucket MY-BUCKET --in-lambda runs/sample/best --new-token alice   # no endpoint at all
    python lambda/deploy_relay.py --bucket MY-BUCKET --endpoint victorian --new-token alice     # prints alice's address
    python lambda/deploy_relay.py --bucket MY-BUCKET --revoke alice
    python lambda/deploy_relay.py --bucket MY-BUCKET --delete

Without any token the gateway lets nobody in. Run it again after a change: flags that are not given keep their values.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import secrets
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE.parent / "sagemaker"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from ecr_images import BUILD as DOCKER_FLAGS  # noqa: E402
from ecr_images import LAMBDA, pinned  # noqa: E402

from cli import parse_flags, run_main  # noqa: E402
from config import FINISH_SENTENCE, ConfigError, FrozenSettings, GenerationParams  # noqa: E402
from storage import s3  # noqa: E402

FILES = ("relay.py", "endpoint.py", "limits.py", "wire.py")
CODE = "CodeUri: ../build/relay"
WORKERS = 50  # reserved by a first deployment that names no other number
MODEL_BYTES = 1 << 30  # of a model that writes in Lambda
SETTLE_S, POLL_S = 1800.0, 5.0  # for which an earlier change of the stack is waited for, and how often it is asked for
BUILD = HERE.parent / "build"
PREFIX = "victorian-relay/"
REPOSITORY = "victorian-writer"
TAGS = [{"Key": "project", "Value": "victorian-literature-generator"}]
# Each deployment leaves the image before it without a tag; the newest five stay, for a stack that is rolled back.
KEPT_IMAGES = {
    "rules": [
        {
            "rulePriority": 1,
            "selection": {"tagStatus": "untagged", "countType": "imageCountMoreThan", "countNumber": 5},
            "action": {"type": "expire"},
        }
    ]
}


class Flags(FrozenSettings):
    """The gateway's CloudFormation stack."""

    stack: str = Field("victorian-gateway", pattern=r"^[a-zA-Z][-a-zA-Z0-9]{0,100}$")
    """Name of the stack."""
    bucket: str = ""
    """S3 bucket for the functions' code."""
    region: str = ""
    """AWS region; default: that of the AWS settings."""
    endpoint: str = ""
    """SageMaker endpoint; default: unchanged on update, `victorian` on first deployment."""
    mode: Literal["", "auto", "stream", "buffered"] = ""
    """stream for real-time endpoints, buffered for serverless ones; default: unchanged on update, auto at first."""
    in_lambda: Path | None = None
    """Model folder (at most 1 GB) that the worker itself writes with: builds its image with Docker and pushes it."""
    image: str = ""
    """Instead of --in-lambda: an image of lambda/Dockerfile that is in ECR already."""
    architecture: Literal["", "arm64", "x86_64"] = ""
    """Processor that the image is built for; default: unchanged on update, arm64 at first."""
    memory_mb: int = Field(0, ge=0, le=10_240)
    """Memory of a worker with a model; 0 (default): unchanged on update, 3008 at first."""
    max_tokens: int = Field(0, ge=0, le=100_000)
    """Most new tokens in one request; 0 (default): unchanged on update, 2000 on first deployment."""
    max_samples: int = Field(0, ge=0, le=128)
    """Most samples of one prompt; 0 (default): unchanged on update, 4 on first deployment."""
    requests_per_second: int = Field(0, ge=0, le=10_000)
    """Messages and connections a second that are admitted; 0 (default): unchanged on update, 100 at first."""
    log_days: Literal[0, 1, 3, 5, 7, 14, 30, 60, 90, 180, 365] = 0
    """Days that logs are kept; 0 (default): unchanged on update, 14 on first deployment."""
    flush_ms: int = Field(-1, ge=-1, le=10_000)
    """Milliseconds of tokens sent as one message; -1 (default): unchanged on update, 0 on first deployment."""
    workers: int = Field(-1, ge=-1, le=1000)
    """Concurrent generations, reserved; 0 reserves nothing; -1 (default): unchanged on update, 50 at first."""
    origins: str = ""
    """Web origins that may connect, separated by commas; default: unchanged on update, all on first deployment."""
    alarm_topic: str = ""
    """ARN of an SNS topic for alarms; default: unchanged on update, no topic on first deployment."""
    budget_usd: int = Field(0, ge=0)
    """Monthly costs of the account at which --budget-email is told; 0 (default): unchanged on update, 20 at first."""
    budget_email: str = ""
    """Who is told when the costs come near the budget; default: unchanged on update, no budget at first."""
    kms_key: str = ""
    """ARN of a KMS key for tables, logs and variables; default: unchanged on update, AWS's own keys at first."""
    new_token: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,40}$")
    """Create a token for this name and print it once."""
    token_days: int = Field(0, ge=0, le=3650)
    """Days after which the new token expires; 0: never."""
    token_daily: int = Field(0, ge=0, le=10**9)
    """Tokens of text that the new token is good for on one day (UTC); 0: any number."""
    revoke: str = ""
    """Revoke the token of this name (new connections; an open one ends within two hours)."""
    package: bool = False
    """Only write build/relay.zip and build/template.yaml."""
    delete: bool = False
    """Delete the stack and the uploaded code."""


def limits_json() -> str:
    """limits.json: the JSON schema of each sampling setting, for limits.py, which has no pydantic."""
    schemas = GenerationParams.model_json_schema()["properties"]
    schemas["finish_sentence"]["default"] = FINISH_SENTENCE  # that of the endpoint's folder_defaults
    return json.dumps(schemas, separators=(",", ":"))


def package() -> bytes:
    """The functions' code as a zip file; the same sources give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        contents = {name: (HERE / name).read_bytes() for name in FILES}
        for name, content in {**contents, "limits.json": limits_json().encode()}.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return packed.getvalue()


def template(place: str) -> str:
    """The template with the code's S3 URL."""
    text = (HERE / "template.yaml").read_text(encoding="utf-8")
    if CODE not in text:
        raise RuntimeError(f"lambda/template.yaml must contain `{CODE}`: restore that line")
    return text.replace(CODE, f"CodeUri: {place}")


def template_parameters() -> set[str]:
    text = (HERE / "template.yaml").read_text(encoding="utf-8")
    return set(re.findall(r"^  (\w+):$", text[text.index("\nParameters:") : text.index("\nConditions:")], re.MULTILINE))


def parameters(flags: Flags, existing: set[str]) -> list[dict[str, Any]]:
    """The stack's parameters: the flags given, and the previous values of the others that the stack has already."""
    given = {
        "EndpointName": flags.endpoint.lower(),  # as in the endpoint's ARN
        "EndpointMode": flags.mode,
        "ImageUri": flags.image,
        "Architecture": flags.architecture,
        "MemoryMb": str(flags.memory_mb or ""),
        "MaxTokens": str(flags.max_tokens or ""),
        "MaxSamples": str(flags.max_samples or ""),
        "RequestsPerSecond": str(flags.requests_per_second or ""),
        "LogDays": str(flags.log_days or ""),
        "FlushMs": str(flags.flush_ms) if flags.flush_ms >= 0 else "",
        "Workers": str(flags.workers) if flags.workers >= 0 else "",
        "AllowedOrigins": flags.origins,
        "AlarmTopic": flags.alarm_topic,
        "BudgetUsd": str(flags.budget_usd or ""),
        "BudgetEmail": flags.budget_email,
        "KmsKey": flags.kms_key,
    }
    made: list[dict[str, Any]] = [
        {"ParameterKey": key, "ParameterValue": value} for key, value in given.items() if value
    ]
    if flags.endpoint and not flags.image:  # from a model in Lambda back to an endpoint
        made.append({"ParameterKey": "ImageUri", "ParameterValue": ""})
    kept = sorted(existing & template_parameters() - {item["ParameterKey"] for item in made})
    return made + [{"ParameterKey": key, "UsePreviousValue": True} for key in kept]


def values(stack: dict[str, Any]) -> dict[str, str]:
    """The parameters that a stack has now."""
    return {item["ParameterKey"]: item.get("ParameterValue", "") for item in stack.get("Parameters", [])}


def check_model(folder: Path) -> None:
    """ConfigError for what is no model folder, or one that is too large for Lambda."""
    if not (folder / "config.json").is_file():
        raise ConfigError([f"--in-lambda {folder}: no config.json there: give a model folder like runs/NAME/best"])
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if size > MODEL_BYTES:
        raise ConfigError(
            [
                f"--in-lambda {folder}: {size / 1e9:.1f} GB, and a model in Lambda may have {MODEL_BYTES / 1e9:.1f}: export a "
                f"smaller one (`python export.py`), or deploy it as an endpoint (sagemaker/)"
            ]
        )


def build_commands(model: Path, image: str, architecture: str) -> list[list[str]]:
    """The Docker commands that build the worker's image with a model in it and push it."""
    platform = {"x86_64": "linux/amd64"}.get(architecture, "linux/arm64")
    build = ["docker", "buildx", "build", "--platform", platform, *DOCKER_FLAGS.split(), "--file", "lambda/Dockerfile"]
    return [
        ["docker", "login", "--username", "AWS", "--password-stdin", image.split("/")[0]],
        [*build, "--build-context", f"model={model.resolve()}", "--tag", image, "."],
    ]


class AwsClients:
    """The AWS clients of one run."""

    def __init__(self, region: str):
        import boto3

        self.region = region or boto3.session.Session().region_name or ""
        if not self.region:
            raise ConfigError(["no AWS region: give --region, or set AWS_DEFAULT_REGION"])
        self.make = lambda name: boto3.client(name, region_name=self.region)
        self.cloudformation, self.s3 = self.make("cloudformation"), self.make("s3")

    def stack(self, name: str) -> dict[str, Any]:
        """The stack's description; empty if there is none."""
        from botocore.exceptions import ClientError

        try:
            found: dict[str, Any] = self.cloudformation.describe_stacks(StackName=name)["Stacks"][0]
        except ClientError as error:
            if "does not exist" in error.response["Error"]["Message"]:
                return {}
            raise
        return found

    def settled(self, name: str) -> dict[str, Any]:
        """The stack, once no earlier deployment or deletion is at work on it."""
        until, said = time.monotonic() + SETTLE_S, ""
        while True:
            found = self.stack(name)
            status = found.get("StackStatus", "")
            if not status.endswith("_IN_PROGRESS") or status == "REVIEW_IN_PROGRESS":
                return found
            if time.monotonic() > until:
                raise RuntimeError(f"stack {name} is still in {status}: see its events in the CloudFormation console")
            if status != said:
                print(f"stack {name} is in {status}: waiting for its end", file=sys.stderr)
            said = status
            time.sleep(POLL_S)

    def repaired(self, name: str) -> dict[str, Any]:
        """The stack, once it can be updated: one that never came up is deleted, a broken rollback is completed."""
        found = self.settled(name)
        status = found.get("StackStatus", "")
        if status in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED"):
            print(f"stack {name} is in {status}, in which it cannot be updated: deleting it", file=sys.stderr)
            self.delete_stack(name)
            return {}
        if status == "UPDATE_ROLLBACK_FAILED":
            print(f"stack {name} is in {status}: completing its rollback", file=sys.stderr)
            self.cloudformation.continue_update_rollback(StackName=name)
            self.cloudformation.get_waiter("stack_rollback_complete").wait(StackName=name)
        return {} if status == "REVIEW_IN_PROGRESS" else found

    def check_reservation(self, flags: Flags, stack: dict[str, Any]) -> None:
        """ConfigError if the account's quota does not allow the reservation that is asked for."""
        held = int(values(stack).get("Workers", "0"))
        wanted = flags.workers if flags.workers >= 0 else held if stack else WORKERS
        if not wanted or (stack and wanted <= held):
            return
        limit = self.make("lambda").get_account_settings()["AccountLimit"]
        at_once, free = limit["ConcurrentExecutions"], limit["UnreservedConcurrentExecutions"] + held
        least = min(100, at_once)  # that must stay unreserved
        if free - wanted < least:
            most = max(0, free - least)
            raise ConfigError(
                [
                    f"--workers {wanted}: this account runs {at_once} functions at once, of which {least} must stay "
                    f"unreserved: deploy with --workers {most}{' (no reservation)' if not most else ''}, or ask for more in "
                    f"Service Quotas (AWS Lambda, Concurrent executions)"
                ]
            )

    def old_tokens(self, stack: dict[str, Any]) -> dict[str, str]:
        """Tokens (name: sha256) of a stack from before there was a table of them."""
        if "Tokens" not in {item["ParameterKey"] for item in stack.get("Parameters", [])}:
            return {}
        found = self.cloudformation.describe_stack_resource(
            StackName=stack["StackName"], LogicalResourceId="AuthorizerFunction"
        )["StackResourceDetail"]["PhysicalResourceId"]
        settings = self.make("lambda").get_function_configuration(FunctionName=found)
        tokens = settings.get("Environment", {}).get("Variables", {}).get("TOKENS", "")
        return dict(pair.split(":", 1) for pair in tokens.split(",") if ":" in pair)

    def put_token(self, table: str, name: str, digest: str, flags: Flags | None = None) -> None:
        item = {"id": {"S": digest}, "name": {"S": name}}
        if flags and flags.token_days:
            item["expires"] = {"N": str(int(time.time()) + 86_400 * flags.token_days)}
        if flags and flags.token_daily:
            item["daily"] = {"N": str(flags.token_daily)}
        self.make("dynamodb").put_item(TableName=table, Item=item)

    def revoke(self, table: str, name: str) -> None:
        """Delete a name's tokens; ConfigError for an unknown name."""
        db = self.make("dynamodb")
        pages = db.get_paginator("scan").paginate(TableName=table)
        items = [item for page in pages for item in page["Items"] if "name" in item]
        found = [item for item in items if item["name"]["S"] == name]
        if not found:
            known = ", ".join(sorted(item["name"]["S"] for item in items)) or "none"
            raise ConfigError([f"--revoke {name}: no such name; there are {known}"])
        for item in found:
            db.delete_item(TableName=table, Key={"id": item["id"]})

    def image(self, flags: Flags, stack: dict[str, Any]) -> str:
        """The worker's image by its digest: built and pushed for --in-lambda, "" where neither it nor --image is given."""
        ecr, image = self.make("ecr"), flags.image
        if flags.in_lambda is not None:
            check_model(flags.in_lambda)
            try:
                made = ecr.create_repository(repositoryName=REPOSITORY, tags=TAGS)["repository"]
            except ecr.exceptions.RepositoryAlreadyExistsException:
                made = ecr.describe_repositories(repositoryNames=[REPOSITORY])["repositories"][0]
            image = f"{made['repositoryUri']}:latest"
            ecr.put_lifecycle_policy(repositoryName=REPOSITORY, lifecyclePolicyText=json.dumps(KEPT_IMAGES))
            architecture = flags.architecture or values(stack).get("Architecture", "")
            login = ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"]
            password = base64.b64decode(login).partition(b":")[2]
            for command in build_commands(flags.in_lambda, image, architecture):
                try:
                    subprocess.run(command, check=True, cwd=HERE.parent, input=password, stdout=sys.stderr)
                except FileNotFoundError:
                    raise ConfigError(
                        [
                            "--in-lambda: there is no docker here: install it, or build the image elsewhere and give --image"
                        ]
                    ) from None
                except subprocess.CalledProcessError as error:
                    raise RuntimeError(f"`{shlex.join(command)}` ended with code {error.returncode}") from None
        return pinned(image, ecr, LAMBDA) if image else ""

    def upload(self, bucket: str, code: bytes) -> str:
        key = f"{PREFIX}{hashlib.sha256(code).hexdigest()[:16]}.zip"
        self.s3.put_object(Bucket=bucket, Key=key, Body=code)
        return f"s3://{bucket}/{key}"

    def apply(self, flags: Flags, body: str, stack: dict[str, Any]) -> dict[str, str]:
        """Create or update the stack by a change set; its outputs. RuntimeError with the first reason of a failure."""
        from botocore.exceptions import WaiterError

        exists = bool(stack)
        name = f"deploy-{secrets.token_hex(4)}"
        self.cloudformation.create_change_set(
            StackName=flags.stack,
            ChangeSetName=name,
            ChangeSetType="UPDATE" if exists else "CREATE",
            TemplateBody=body,
            Parameters=parameters(flags, {item["ParameterKey"] for item in stack.get("Parameters", [])}),
            Capabilities=["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
            Tags=TAGS,
        )
        which = {"StackName": flags.stack, "ChangeSetName": name}
        waiter = self.cloudformation.get_waiter("change_set_create_complete")
        try:
            waiter.wait(**which, WaiterConfig={"Delay": 3})
        except WaiterError:
            reason = self.cloudformation.describe_change_set(**which).get("StatusReason", "no reason given")
            self.cloudformation.delete_change_set(**which)
            if "didn't contain changes" not in reason and "No updates" not in reason:
                raise RuntimeError(f"stack {flags.stack}: {reason}") from None
            print(f"stack {flags.stack}: up to date", file=sys.stderr)
            return self.outputs(flags.stack)
        self.cloudformation.execute_change_set(**which)
        print(f"stack {flags.stack}: {'updating' if exists else 'creating'} (one to three minutes)", file=sys.stderr)
        try:
            kind = "stack_update_complete" if exists else "stack_create_complete"
            self.cloudformation.get_waiter(kind).wait(StackName=flags.stack, WaiterConfig={"Delay": 5})
        except WaiterError:
            raise RuntimeError(f"stack {flags.stack}: {self.first_failure(flags.stack)}") from None
        outputs = self.outputs(flags.stack)
        if exists and "ApiId" in outputs:  # a deployment is a snapshot of the routes: CloudFormation keeps the first
            self.make("apigatewayv2").create_deployment(ApiId=outputs["ApiId"], StageName="prod")
        return outputs

    def outputs(self, stack: str) -> dict[str, str]:
        found = self.cloudformation.describe_stacks(StackName=stack)["Stacks"][0].get("Outputs", [])
        return {item["OutputKey"]: item["OutputValue"] for item in found}

    def first_failure(self, stack: str) -> str:
        """Why the newest change failed: the earliest failing resource names the cause, the others follow from it."""
        for event in reversed(self.cloudformation.describe_stack_events(StackName=stack)["StackEvents"]):
            reason = event.get("ResourceStatusReason", "")
            if event["ResourceStatus"].endswith("_FAILED") and "cancelled" not in reason:
                return f"{event['LogicalResourceId']}: {reason}{s3.needed(reason)}"
        return "failed without a reason: see its events in the CloudFormation console"

    def delete_stack(self, name: str) -> None:
        """Delete a stack; RuntimeError with the resource that stays and the reason."""
        from botocore.exceptions import WaiterError

        self.cloudformation.delete_stack(StackName=name)
        waiter = self.cloudformation.get_waiter("stack_delete_complete")
        try:
            waiter.wait(StackName=name, WaiterConfig={"Delay": 5})
        except WaiterError:
            raise RuntimeError(f"stack {name} could not be deleted: {self.first_failure(name)}") from None

    def delete(self, flags: Flags) -> None:
        if self.settled(flags.stack):
            self.delete_stack(flags.stack)
            print(f"deleted: stack {flags.stack}", file=sys.stderr)
        else:
            print(f"no stack {flags.stack} in {self.region}", file=sys.stderr)
        if not flags.bucket:
            print("the uploaded code in S3 stays: give --bucket to delete it as well", file=sys.stderr)
        else:
            for item in self.s3.list_objects_v2(Bucket=flags.bucket, Prefix=PREFIX).get("Contents", []):
                self.s3.delete_object(Bucket=flags.bucket, Key=item["Key"])
                print(f"deleted: s3://{flags.bucket}/{item['Key']}", file=sys.stderr)
        ecr = self.make("ecr")
        with contextlib.suppress(ecr.exceptions.RepositoryNotFoundException):
            ecr.delete_repository(repositoryName=REPOSITORY, force=True)
            print(f"deleted: images in {REPOSITORY}", file=sys.stderr)


def deploy(flags: Flags, aws: AwsClients) -> None:
    """Create or update the stack, then its tokens; prints the address."""
    stack = aws.repaired(flags.stack)
    aws.check_reservation(flags, stack)
    old = aws.old_tokens(stack)
    flags = flags.model_copy(update={"image": aws.image(flags, stack)})
    outputs = aws.apply(flags, template(aws.upload(flags.bucket, package())), stack)
    for name, value in outputs.items():
        print(f"{name}: {value}", file=sys.stderr)
    table = outputs.get("TokensTable", "")
    for name, digest in old.items():
        aws.put_token(table, name, digest)
    if flags.revoke:
        aws.revoke(table, flags.revoke)
    token = secrets.token_urlsafe(32) if flags.new_token else ""
    if token:
        aws.put_token(table, flags.new_token, hashlib.sha256(token.encode()).hexdigest(), flags)
        print("This address is shown once; anyone who has it can connect:", file=sys.stderr)
    print(outputs.get("Url", "") + (f"?token={token}" if token else ""))


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        flags = parse_flags(Flags, argv, examples=__doc__)
        if flags.package:
            BUILD.mkdir(exist_ok=True)
            (BUILD / "relay.zip").write_bytes(package())
            (BUILD / "template.yaml").write_text(template("relay.zip"), encoding="utf-8")
            print(BUILD / "relay.zip")
            return 0
        if not flags.bucket and not flags.delete:
            raise ConfigError(["--bucket is missing: the S3 bucket that the functions' code goes to"])
        with s3.readable_errors(f"stack {flags.stack}"):
            aws = AwsClients(flags.region)
            if flags.delete:
                aws.delete(flags)
                return 0
            deploy(flags, aws)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
