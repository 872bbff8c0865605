#!/opt/foundation/bin/python3
"""Makes the bucket of compose.yaml; that it is there already is no error. Address and keys: from the environment."""

import os
from urllib.parse import urlsplit

import boto3


def main() -> None:
    """Raises botocore's ClientError where the bucket neither exists nor can be made."""
    name = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    if name not in there:
        client.create_bucket(Bucket=name)
    print(f"bucket {name}: {'there' if name in there else 'made'}")


if __name__ == "__main__":
    main()
