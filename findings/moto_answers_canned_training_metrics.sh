#!/usr/bin/env bash
# Expected: after create_training_job, moto's describe_training_job answers the job's own MetricDefinitions and Environment, and no metric of a job that
# never ran.
# Seen with moto 5.2.5: MetricDefinitions are replaced by one fixed definition, Environment is left out, and FinalMetricDataList holds a value. A test that reads
# them back passes or fails for no reason of the launcher's: look at the request instead (botocore's "provide-client-params" event).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check moto==5.2.5 boto3==1.44.5 2>/dev/null
AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=eu-west-1 "$folder/venv/bin/python" - <<'PY'
import boto3
import moto
from moto import mock_aws

with mock_aws():
    client = boto3.client("sagemaker")
    metrics = [{"Name": "val_loss", "Regex": "val_loss=([0-9.]+)"}]
    client.create_training_job(
        TrainingJobName="letters",
        AlgorithmSpecification={
            "TrainingImage": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/letters:1",
            "TrainingInputMode": "File",
            "MetricDefinitions": metrics,
        },
        RoleArn="arn:aws:iam::123456789012:role/letters",
        OutputDataConfig={"S3OutputPath": "s3://letters/out"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 10},
        StoppingCondition={"MaxRuntimeInSeconds": 600},
        Environment={"STYLE": "letters"},
    )
    job = client.describe_training_job(TrainingJobName="letters")
found = job["AlgorithmSpecification"]["MetricDefinitions"]
print(f"moto {moto.__version__}")
print("sent:", metrics, "answered:", found)
print("sent: STYLE=letters, answered:", job.get("Environment"))
print("final metrics:", [(metric["MetricName"], metric["Value"]) for metric in job.get("FinalMetricDataList", [])])
assert found != metrics and "Environment" not in job and job["FinalMetricDataList"], "moto answers otherwise now"
PY
