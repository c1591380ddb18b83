"""The gateway's stack: the package, the calls that deploy it, its tokens, and that it goes away."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import deploy_relay
import pytest
from deploy_relay import main, package, template, with_tokens

from config import ConfigError, GenerationParams
from support.helpers import ROOT

OUTPUTS = {"Url": "wss://api.execute-api.eu-west-1.amazonaws.com/prod", "ApiId": "api"}


class Cloud:
    """boto3's clients, answering from a script and writing down what they are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        import boto3
        from botocore.client import BaseClient

        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.stack: dict[str, Any] | None = None
        self.tokens = ""
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
        if name == "DescribeStacks":
            if self.stack is None:
                raise ClientError({"Error": {"Code": "ValidationError", "Message": "Stack x does not exist"}}, name)
            return {"Stacks": [self.stack]}
        if name == "ExecuteChangeSet":
            kind = "UPDATE" if self.stack else "CREATE"
            outputs = [{"OutputKey": key, "OutputValue": value} for key, value in OUTPUTS.items()]
            self.stack = {"StackName": "s", "StackStatus": f"{kind}_COMPLETE", "Outputs": outputs}
        if name == "DeleteStack":
            self.stack = None
        answers: dict[str, Any] = {
            "DescribeChangeSet": self.change_set,
            "DescribeStackResource": {"StackResourceDetail": {"PhysicalResourceId": "authorizer-function"}},
            "GetFunctionConfiguration": {"Environment": {"Variables": {"TOKENS": self.tokens}}},
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
        assert json.loads(archive.read("limits.json")) == GenerationParams.model_json_schema()["properties"]
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
        "Tokens": f"alice:{hashlib.sha256(token.encode()).hexdigest()}",
    }
    put = cloud.asked("PutObject")
    assert put["Body"] == package() and f"CodeUri: s3://b/{put['Key']}" in asked["TemplateBody"]
    assert token not in json.dumps([given for _, given in cloud.calls], default=str)
    assert "CreateDeployment" not in [name for name, _ in cloud.calls]


def test_a_change_keeps_the_rest_and_renews_the_routes(cloud: Cloud) -> None:
    assert main(["--bucket", "b"]) == 0
    cloud.tokens = "alice:aa"
    assert main(["--bucket", "b", "--flush-ms", "0", "--new-token", "bob"]) == 0
    asked = cloud.asked("CreateChangeSet")
    assert asked["ChangeSetType"] == "UPDATE"
    given = values(asked)
    assert given.pop("Tokens").startswith("alice:aa,bob:") and given.pop("FlushMs") == "0"
    assert set(given.values()) == {"previous"}
    assert cloud.asked("CreateDeployment") == {"ApiId": "api", "StageName": "prod"}


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
    assert main(["--bucket", "b"]) == 0
    names = [name for name, _ in cloud.calls]
    assert names.index("DeleteStack") < names.index("CreateChangeSet")
    assert cloud.asked("CreateChangeSet")["ChangeSetType"] == "CREATE"


def test_delete_takes_the_code_along(cloud: Cloud) -> None:
    assert main(["--bucket", "b"]) == 0
    assert main(["--bucket", "b", "--delete"]) == 0
    assert cloud.stack is None and cloud.asked("DeleteObject")["Key"] == "victorian-relay/x.zip"


def test_tokens_are_added_replaced_and_revoked() -> None:
    assert with_tokens("", "a", "1", "") == "a:1"
    assert with_tokens("a:1,b:2", "b", "3", "") == "a:1,b:3"
    assert with_tokens("a:1,b:2", "", "", "a") == "b:2"
    with pytest.raises(ConfigError, match="there are a"):
        with_tokens("a:1", "", "", "c")


def test_parameters_exist_in_the_template() -> None:
    text = (ROOT / "lambda" / "template.yaml").read_text()
    flags = deploy_relay.Flags(
        endpoint="e", mode="auto", max_tokens=1, flush_ms=0, workers=1, origins="o", alarm_topic="t"
    )
    for item in deploy_relay.parameters(flags, "", True):
        assert f"\n  {item['ParameterKey']}:\n" in text
    assert main([]) == 2
