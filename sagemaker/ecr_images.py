"""The image in ECR behind a tag: its digest, and whether the service that is to run it takes its manifest.

>>> pinned("111122223333.dkr.ecr.eu-west-1.amazonaws.com/victorian:cpu", boto3.client("ecr"), SAGEMAKER)
'111122223333.dkr.ecr.eu-west-1.amazonaws.com/victorian@sha256:…'
"""

from __future__ import annotations

import re
from typing import Any

from config import ConfigError

URI = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[^:@]+)(:(?P<tag>[^@]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
DOCKER, OCI = "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json"
# SageMaker refuses OCI manifests and every index (https://github.com/aws/amazon-sagemaker-feedback/issues/180);
# Lambda refuses an index alone (https://github.com/docker/buildx/issues/1533).
SAGEMAKER, LAMBDA = (DOCKER,), (DOCKER, OCI)
BUILD = "--provenance=false --output type=image,oci-mediatypes=false,push=true"


def pinned(image: str, ecr: Any, accepted: tuple[str, ...]) -> str:
    """The image by its digest, so that a tag that was pushed again is another image.

    An image of another registry is returned as it is. ConfigError for a missing image and for a manifest that is none of
    `accepted`.
    """
    named = URI.fullmatch(image)
    if named is None:
        return image
    which = {"imageDigest": named["digest"]} if named["digest"] else {"imageTag": named["tag"] or "latest"}
    try:
        found = ecr.describe_images(registryId=named["account"], repositoryName=named["repository"], imageIds=[which])[
            "imageDetails"
        ][0]
    except (ecr.exceptions.ImageNotFoundException, ecr.exceptions.RepositoryNotFoundException):
        raise ConfigError([f"--image {image}: ECR has no such image: build and push it (docs/aws.md)"]) from None
    kind = found.get("imageManifestMediaType", accepted[0])
    if kind not in accepted:
        raise ConfigError(
            [
                f"--image {image}: its manifest is {kind}, which the service refuses: build it with `docker buildx build {BUILD}`"
            ]
        )
    return f"{image.partition('@')[0].removesuffix(':' + (named['tag'] or ''))}@{found['imageDigest']}"
