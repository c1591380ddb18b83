"""The gateway's stack: the package, the calls that deploy it, its tokens, and that it goes away."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import deploy_relay
import pytest
from deploy_relay import main, package, template

from config import FINISH_SENTENCE, GenerationParams
from support.helpers import ROOT

OUTPUTS = {"Url": "wss://api.execute-api.eu-west-1.amazonaws.com/prod", "ApiId": "api", "TokensTable": "tokens"}


REGISTRY, DIGEST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com", "sha256:" + "a" * 64


class Cloud:
    """boto3's clients, answering from a script and writing down what they are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        import boto3
        from botocore.client import BaseClient

        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.stack: dict[str, Any] | None = None
        self.tokens = ""
        self.table: dict[str, dict[str, Any]] = {}
        self.limit = {"ConcurrentExecutions": 1000, "UnreservedConcurrentExecutions": 1000}
        self.errors: dict[str, tuple[str, str]] = {}
        self.media_type = "application/vnd.docker.distribution.manifest.v2+json"
        self.change_set = {"Status": "CREATE_COMPLETE"}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        monkeypatch.setattr(BaseClient, "_make_api_call", lambda client, name, given: self.answer(client, name, given))

    def answer(self, client: Any, name: str, given: dict[str, Any]) -> Any:
        from botocore.exceptions import ClientError
        from botocore.validate import validate_parameters

        validate_parameters(given, client.meta.service_model.operation_model(name).input_shape)
        self.calls.append((name, given))
        if name in self.errors:
            code, message = self.errors[name]
            raise ClientError({"Error": {"Code": code, "Message": message}}, name)
        if name == "PutItem":
            self.table[given["Item"]["id"]["S"]] = given["Item"]
        if name == "DeleteItem":
            del self.table[given["Key"]["id"]["S"]]
        if name == "DescribeStacks":
            if self.stack is None:
                raise ClientError({"Error": {"Code": "ValidationError", "Message": "Stack x does not exist"}}, name)
            return {"Stacks": [self.stack]}
        if name == "ExecuteChangeSet":
            kind = "UPDATE" if self.stack else "CREATE"
            outputs = [{"OutputKey": key, "OutputValue": value} for key, value in OUTPUTS.items()]
            known = {item["ParameterKey"]: "" for item in self.stack.get("Parameters", [])} if self.stack else {}
            known |= {name: "" for name in deploy_relay.template_parameters()}
            known |= {
                item["ParameterKey"]: item.get("ParameterValue", "")
                for item in self.asked("CreateChangeSet")["Parameters"]
            }
            known["Workers"] = known["Workers"] or "50"
            parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in known.items()]
            self.stack = {
                "StackName": "s", "StackStatus": f"{kind}_COMPLETE", "Outputs": outputs, "Parameters": parameters
            }  # fmt: skip
        if name == "DeleteStack":
            self.stack = None
        answers: dict[str, Any] = {
            "DescribeChangeSet": self.change_set,
            "DescribeStackResource": {"StackResourceDetail": {"PhysicalResourceId": "authorizer-function"}},
            "GetFunctionConfiguration": {"Environment": {"Variables": {"TOKENS": self.tokens}}},
            "GetAccountSettings": {"AccountLimit": self.limit},
            "Scan": {"Items": list(self.table.values())},
            "CreateRepository": {"repository": {"repositoryUri": REGISTRY + "/victorian-writer"}},
            "GetAuthorizationToken": {"authorizationData": [{"authorizationToken": "QVdTOnNlY3JldA=="}]},
            "DescribeImages": {"imageDetails": [{"imageDigest": DIGEST, "imageManifestMediaType": self.media_type}]},
            "ListObjectsV2": {"Contents": [{"Key": "victorian-relay/x.zip"}]},
        }
        return answers.get(name, {})

    def asked(self, name: str) -> dict[str, Any]:
        return next(given for called, given in reversed(self.calls) if called == name)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    yield Cloud(monkeypatch)


def values(given: dict[str, Any]) -> dict[str, Any]:
    return {item["ParameterKey"]: item.get("ParameterValue", "previous") for item in given["Parameters"]}


def test_the_package_holds_the_handlers_and_is_reproducible() -> None:
    with zipfile.ZipFile(io.BytesIO(package())) as archive:
        assert set(archive.namelist()) == {*deploy_relay.FILES, "limits.json"}
        schemas = GenerationParams.model_json_schema()["properties"]
        schemas["finish_sentence"]["default"] = FINISH_SENTENCE
        assert json.loads(archive.read("limits.json")) == schemas
        assert archive.read("relay.py") == (ROOT / "lambda" / "relay.py").read_bytes()
    assert package() == package()
    assert "CodeUri: s3://b/k.zip" in template("s3://b/k.zip") and "../build" not in template("s3://b/k.zip")


def test_a_first_deployment(cloud: Cloud, capsys: Any) -> None:
    words = ["--bucket", "b", "--endpoint", "novel", "--mode", "stream", "--new-token", "alice"]
    assert main(words) == 0
    url = capsys.readouterr().out.strip()
    token = url.removeprefix(OUTPUTS["Url"] + "?token=")
    assert len(token) >= 40
    asked = cloud.asked("CreateChangeSet")
    assert asked["ChangeSetType"] == "CREATE"
    assert set(asked["Capabilities"]) == {"CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"}
    assert values(asked) == {
        "EndpointName": "novel",
        "EndpointMode": "stream",
        "ImageUri": "",
    }
    digest = hashlib.sha256(token.encode()).hexdigest()
    assert cloud.table == {digest: {"id": {"S": digest}, "name": {"S": "alice"}}}
    put = cloud.asked("PutObject")
    assert put["Body"] == package() and f"CodeUri: s3://b/{put['Key']}" in asked["TemplateBody"]
    assert token not in json.dumps([given for _, given in cloud.calls], default=str)
    assert "CreateDeployment" not in [name for name, _ in cloud.calls]


def test_a_change_keeps_the_rest_and_renews_the_routes(cloud: Cloud) -> None:
    """Every parameter of the template is kept (UsePreviousValue), those that once had no flag as well."""
    assert main(["--bucket", "b", "--requests-per-second", "7", "--max-samples", "2", "--log-days", "30"]) == 0
    first = values(cloud.asked("CreateChangeSet"))
    assert first == {"RequestsPerSecond": "7", "MaxSamples": "2", "LogDays": "30"}
    assert main(["--bucket", "b", "--flush-ms", "0"]) == 0
    asked = cloud.asked("CreateChangeSet")
    assert asked["ChangeSetType"] == "UPDATE"
    given = values(asked)
    assert given.pop("FlushMs") == "0"
    assert set(given) == deploy_relay.template_parameters() - {"FlushMs"} and set(given.values()) == {"previous"}
    assert cloud.asked("CreateDeployment") == {"ApiId": "api", "StageName": "prod"}


def test_a_stack_with_its_tokens_in_lambdas_environment_moves_them(cloud: Cloud) -> None:
    """Lambda's environment holds 4 KB (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html), 50 tokens."""
    assert main(["--bucket", "b"]) == 0
    cloud.stack["Parameters"] = [{"ParameterKey": "Tokens"}, {"ParameterKey": "FlushMs"}]
    cloud.tokens = "alice:aa,bob:bb"
    assert main(["--bucket", "b"]) == 0
    assert values(cloud.asked("CreateChangeSet")) == {"FlushMs": "previous"}
    assert {key: item["name"]["S"] for key, item in cloud.table.items()} == {"aa": "alice", "bb": "bob"}


def test_a_small_quota_is_told_before_the_stack_fails(cloud: Cloud, capsys: Any) -> None:
    """A new account has 10 concurrent executions and none to reserve: "decreases account's UnreservedConcurrentExecution
    below its minimum value of [10]" (PutFunctionConcurrency; aws/serverless-application-model#3709 and others)."""
    cloud.limit = {"ConcurrentExecutions": 10, "UnreservedConcurrentExecutions": 10}
    assert main(["--bucket", "b"]) == 2
    said = capsys.readouterr().err
    assert "runs 10 functions at once" in said and "--workers 0" in said and cloud.stack is None
    assert main(["--bucket", "b", "--workers", "0"]) == 0
    assert values(cloud.asked("CreateChangeSet"))["Workers"] == "0"
    cloud.limit = {"ConcurrentExecutions": 1000, "UnreservedConcurrentExecutions": 160}
    assert main(["--bucket", "b", "--workers", "80"]) == 2
    assert "--workers 60" in capsys.readouterr().err


def test_a_model_in_lambda(cloud: Cloud, capsys: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, **more: ran.append([*command, more["input"].decode()]))
    assert main(["--bucket", "b", "--in-lambda", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["--bucket", "b", "--in-lambda", str(tmp_path)]) == 0
    login, build = ran
    assert login == ["docker", "login", "--username", "AWS", "--password-stdin", REGISTRY, "secret"]
    for words in ("--provenance=false", "--platform linux/arm64", f"--build-context model={tmp_path}", "push=true"):
        assert words in " ".join(build)
    assert values(cloud.asked("CreateChangeSet")) == {"ImageUri": f"{REGISTRY}/victorian-writer@{DIGEST}"}
    monkeypatch.setattr(deploy_relay, "MODEL_BYTES", 1)
    assert main(["--bucket", "b", "--in-lambda", str(tmp_path)]) == 2
    assert "a smaller one" in capsys.readouterr().err
    cloud.media_type = "application/vnd.oci.image.index.v1+json"
    assert main(["--bucket", "b", "--image", f"{REGISTRY}/victorian-writer:latest"]) == 2
    assert "--provenance=false" in capsys.readouterr().err
    assert main(["--bucket", "b", "--endpoint", "Novel"]) == 0
    assert values(cloud.asked("CreateChangeSet"))["ImageUri"] == ""
    assert values(cloud.asked("CreateChangeSet"))["EndpointName"] == "novel"


def test_nothing_to_change_is_no_fault(cloud: Cloud, capsys: Any) -> None:
    assert main(["--bucket", "b"]) == 0
    cloud.change_set = {"Status": "FAILED", "StatusReason": "The submitted information didn't contain changes."}
    assert main(["--bucket", "b"]) == 0
    assert "up to date" in capsys.readouterr().err
    cloud.change_set = {"Status": "FAILED", "StatusReason": "Template format error"}
    assert main(["--bucket", "b"]) == 1
    assert "Template format error" in capsys.readouterr().err


def test_a_stack_that_never_came_up_is_made_anew(cloud: Cloud) -> None:
    cloud.stack = {"StackName": "s", "StackStatus": "ROLLBACK_COMPLETE"}
    assert main(["--bucket", "b", "--new-token", "alice"]) == 0
    names = [name for name, _ in cloud.calls]
    assert names.index("DeleteStack") < names.index("CreateChangeSet")
    assert cloud.asked("CreateChangeSet")["ChangeSetType"] == "CREATE"
    assert [item["name"]["S"] for item in cloud.table.values()] == ["alice"]
    cloud.stack["StackStatus"] = "UPDATE_ROLLBACK_FAILED"
    with contextlib.suppress(KeyError):  # the waiter asks a stack that this fake never repairs
        main(["--bucket", "b"])
    assert "ContinueUpdateRollback" in [name for name, _ in cloud.calls]


def test_delete_takes_the_code_along(cloud: Cloud) -> None:
    assert main(["--bucket", "b"]) == 0
    assert main(["--bucket", "b", "--delete"]) == 0
    assert cloud.stack is None and cloud.asked("DeleteObject")["Key"] == "victorian-relay/x.zip"


def test_tokens_expire_have_an_allowance_and_are_revoked(cloud: Cloud, capsys: Any) -> None:
    assert main(["--bucket", "b", "--new-token", "a", "--token-days", "2", "--token-daily", "5000"]) == 0
    (item,) = cloud.table.values()
    assert item["daily"] == {"N": "5000"} and 0 < int(item["expires"]["N"]) - time.time() <= 2 * 86_400
    for number in range(100):  # a hundred tokens went beyond Lambda's environment
        assert main(["--bucket", "b", "--new-token", f"n{number}"]) == 0
    assert len(cloud.table) == 101
    assert main(["--bucket", "b", "--revoke", "nobody"]) == 2
    assert "there are a, n0" in capsys.readouterr().err
    assert main(["--bucket", "b", "--revoke", "a"]) == 0
    assert len(cloud.table) == 100 and "a" not in {item["name"]["S"] for item in cloud.table.values()}


DENIED = (
    "User: arn:aws:iam::123456789012:user/me is not authorized to perform: iam:PassRole on resource: "
    "arn:aws:iam::123456789012:role/victorian because no identity-based policy allows the iam:PassRole action"
)


@pytest.mark.parametrize(
    ("operation", "message", "statement"),
    [
        ("CreateChangeSet", DENIED, "PassRole"),
        ("DescribeStacks", "User: me is not authorized to perform: cloudformation:DescribeStacks", "Gateway"),
        ("PutObject", "Access Denied", "Bucket"),
        ("GetAccountSettings", "User: me is not authorized to perform: lambda:GetAccountSettings", "Gateway"),
    ],
)
def test_a_denied_action_is_named_with_its_statement(
    cloud: Cloud, capsys: Any, operation: str, message: str, statement: str
) -> None:
    """The sentence of https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html."""
    cloud.errors[operation] = ("AccessDenied", message)
    assert main(["--bucket", "b"]) == 1
    said = capsys.readouterr().err
    assert message in said and f"statement {statement} " in said
    assert ("s3:" in said) == (operation == "PutObject")


def test_parameters_exist_in_the_template() -> None:
    text = (ROOT / "lambda" / "template.yaml").read_text()
    flags = deploy_relay.Flags(
        endpoint="e", mode="auto", max_tokens=1, flush_ms=0, workers=1, origins="o", alarm_topic="t", image="i",
        architecture="arm64", memory_mb=1, max_samples=1, requests_per_second=1, log_days=1, budget_usd=1,
        budget_email="m", kms_key="k",
    )  # fmt: skip
    given = {item["ParameterKey"] for item in deploy_relay.parameters(flags, set())}
    assert given == deploy_relay.template_parameters(), "a flag for each parameter"
    for name in given:
        assert f"\n  {name}:\n" in text
    assert main([]) == 2


def test_the_documents_policy_has_the_statements_that_errors_name() -> None:
    from storage.s3 import STATEMENTS

    text = (ROOT / "docs" / "aws.md").read_text(encoding="utf-8")
    policy = json.loads(text.partition("```json\n")[2].partition("```")[0])
    granted = {
        statement["Sid"]: [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        for statement in policy["Statement"]
    }
    for service, statement in {
        **STATEMENTS,
        "cloudformation": "Gateway",
        "lambda": "Gateway",
        "dynamodb": "Gateway",
    }.items():
        assert any(action.startswith(f"{service}:") for action in granted[statement]), service
    assert granted["PassRole"] == ["iam:PassRole"]
