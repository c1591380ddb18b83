"""Deploys, updates and deletes the WebSocket gateway in an AWS account. Needs only boto3.

    python lambda/deploy_relay.py --bucket MY-BUCKET --endpoint victorian --new-token alice     # prints alice's address
    python lambda/deploy_relay.py --bucket MY-BUCKET --revoke alice
    python lambda/deploy_relay.py --bucket MY-BUCKET --delete

Without any token the gateway lets nobody in. Run it again after a change: flags that are not given keep their values.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))

from cli import parse_flags, run_main  # noqa: E402
from config import ConfigError, FrozenSettings, GenerationParams  # noqa: E402
from storage import s3  # noqa: E402

FILES = ("relay.py", "limits.py", "wire.py")
CODE = "CodeUri: ../build/relay"
BUILD = HERE.parent / "build"
PREFIX = "victorian-relay/"
TAGS = [{"Key": "project", "Value": "victorian-literature-generator"}]


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
    max_tokens: int = Field(0, ge=0, le=100_000)
    """Most new tokens in one request; 0 (default): unchanged on update, 2000 on first deployment."""
    flush_ms: int = Field(-1, ge=-1, le=10_000)
    """Milliseconds of tokens sent as one message; -1 (default): unchanged on update, 0 on first deployment."""
    workers: int = Field(0, ge=0, le=1000)
    """Concurrent generations; 0 (default): unchanged on update, 50 on first deployment."""
    origins: str = ""
    """Web origins that may connect, separated by commas; default: unchanged on update, all on first deployment."""
    alarm_topic: str = ""
    """ARN of an SNS topic for alarms; default: unchanged on update, no topic on first deployment."""
    new_token: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,40}$")
    """Create a token for this name and print it once."""
    revoke: str = ""
    """Revoke the token of this name (new connections; an open one ends within two hours)."""
    package: bool = False
    """Only write build/relay.zip and build/template.yaml."""
    delete: bool = False
    """Delete the stack and the uploaded code."""


def limits_json() -> str:
    """limits.json: the JSON schema of each sampling setting, for limits.py, which has no pydantic."""
    return json.dumps(GenerationParams.model_json_schema()["properties"], separators=(",", ":"))


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
    if text.count(CODE) != 1:
        raise RuntimeError(f"lambda/template.yaml must contain `{CODE}` exactly once: restore that line")
    return text.replace(CODE, f"CodeUri: {place}")


def with_tokens(tokens: str, new: str, digest: str, revoked: str) -> str:
    """`name:sha256` pairs with one added, replaced or removed; ConfigError for an unknown name."""
    pairs = dict(pair.split(":", 1) for pair in tokens.split(",") if ":" in pair)
    if revoked and revoked not in pairs:
        raise ConfigError([f"--revoke {revoked}: no such name; there are {', '.join(pairs) or 'none'}"])
    pairs.pop(revoked, None)
    if new:
        pairs[new] = digest
    return ",".join(f"{name}:{value}" for name, value in pairs.items())


def parameters(flags: Flags, tokens: str | None, exists: bool) -> list[dict[str, Any]]:
    """The stack's parameters: the flags given, and the previous values of the others."""
    given = {
        "EndpointName": flags.endpoint,
        "EndpointMode": flags.mode,
        "MaxTokens": str(flags.max_tokens or ""),
        "FlushMs": str(flags.flush_ms) if flags.flush_ms >= 0 else "",
        "Workers": str(flags.workers or ""),
        "AllowedOrigins": flags.origins,
        "AlarmTopic": flags.alarm_topic,
    }
    made: list[dict[str, Any]] = [
        {"ParameterKey": key, "ParameterValue": value} for key, value in given.items() if value
    ]
    if tokens is not None:
        made.append({"ParameterKey": "Tokens", "ParameterValue": tokens})
    if exists:
        names = {item["ParameterKey"] for item in made}
        kept = sorted({*given, "Tokens"} - names)
        made += [{"ParameterKey": key, "UsePreviousValue": True} for key in kept]
    return made


class AwsClients:
    """The AWS clients of one run."""

    def __init__(self, region: str):
        import boto3

        self.region = region or boto3.session.Session().region_name or ""
        if not self.region:
            raise ConfigError(["no AWS region: give --region, or set AWS_DEFAULT_REGION"])
        self.make = lambda name: boto3.client(name, region_name=self.region)
        self.cloudformation, self.s3 = self.make("cloudformation"), self.make("s3")

    def status(self, stack: str) -> str:
        """The stack's status; empty if there is none."""
        from botocore.exceptions import ClientError

        try:
            return self.cloudformation.describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]
        except ClientError as error:
            if "does not exist" in error.response["Error"]["Message"]:
                return ""
            raise

    def tokens(self, stack: str) -> str:
        """The tokens in force, from the authorizer's environment."""
        found = self.cloudformation.describe_stack_resource(StackName=stack, LogicalResourceId="AuthorizerFunction")[
            "StackResourceDetail"
        ]["PhysicalResourceId"]
        settings = self.make("lambda").get_function_configuration(FunctionName=found)
        return settings.get("Environment", {}).get("Variables", {}).get("TOKENS", "")

    def upload(self, bucket: str, code: bytes) -> str:
        key = f"{PREFIX}{hashlib.sha256(code).hexdigest()[:16]}.zip"
        self.s3.put_object(Bucket=bucket, Key=key, Body=code)
        return f"s3://{bucket}/{key}"

    def apply(self, flags: Flags, body: str, tokens: str | None) -> dict[str, str]:
        """Create or update the stack by a change set; its outputs. RuntimeError with the first reason of a failure."""
        from botocore.exceptions import WaiterError

        status = self.status(flags.stack)
        if status in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED"):
            print(f"the first deployment left stack {flags.stack} in {status}: deleting it", file=sys.stderr)
            self.cloudformation.delete_stack(StackName=flags.stack)
            self.cloudformation.get_waiter("stack_delete_complete").wait(StackName=flags.stack)
            status = ""
        exists = bool(status) and status != "REVIEW_IN_PROGRESS"
        name = f"deploy-{secrets.token_hex(4)}"
        self.cloudformation.create_change_set(
            StackName=flags.stack,
            ChangeSetName=name,
            ChangeSetType="UPDATE" if exists else "CREATE",
            TemplateBody=body,
            Parameters=parameters(flags, tokens, exists),
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
                return f"{event['LogicalResourceId']}: {reason}"
        return "failed without a reason: see its events in the CloudFormation console"

    def delete(self, flags: Flags) -> None:
        self.cloudformation.delete_stack(StackName=flags.stack)
        self.cloudformation.get_waiter("stack_delete_complete").wait(StackName=flags.stack, WaiterConfig={"Delay": 5})
        print(f"deleted: stack {flags.stack}", file=sys.stderr)
        if flags.bucket:
            for item in self.s3.list_objects_v2(Bucket=flags.bucket, Prefix=PREFIX).get("Contents", []):
                self.s3.delete_object(Bucket=flags.bucket, Key=item["Key"])
                print(f"deleted: s3://{flags.bucket}/{item['Key']}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        flags = parse_flags(Flags, argv)
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
            tokens, token = None, ""
            if flags.new_token or flags.revoke:
                token = secrets.token_urlsafe(32) if flags.new_token else ""
                before = aws.tokens(flags.stack) if aws.status(flags.stack) else ""
                digest = hashlib.sha256(token.encode()).hexdigest()
                tokens = with_tokens(before, flags.new_token, digest, flags.revoke)
            outputs = aws.apply(flags, template(aws.upload(flags.bucket, package())), tokens)
            for name, value in outputs.items():
                print(f"{name}: {value}", file=sys.stderr)
            if token:
                print("This address is shown once; anyone who has it can connect:", file=sys.stderr)
            print(outputs.get("Url", "") + (f"?token={token}" if token else ""))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
