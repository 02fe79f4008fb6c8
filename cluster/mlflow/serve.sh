#!/usr/bin/env bash
# Start the server. Passwords are read from mounted files into libpq's and boto's own variables, so that they stand in no
# command line and in no address.
set -euo pipefail
PGPASSWORD=$(< /run/secrets/postgres)
export PGPASSWORD
if [[ $ARTIFACTS == s3://* ]]; then
    AWS_SECRET_ACCESS_KEY=$(< /run/secrets/s3)
    export AWS_SECRET_ACCESS_KEY
    bucket=${ARTIFACTS#s3://}
    python - "${bucket%%/*}" << 'PYTHON'
import sys
import boto3

s3 = boto3.client("s3")
if sys.argv[1] not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
    s3.create_bucket(Bucket=sys.argv[1])
PYTHON
fi
exec mlflow server --host 0.0.0.0 --port "${PORT:-5000}" --workers 4 \
    --backend-store-uri "postgresql+psycopg2://" --artifacts-destination "$ARTIFACTS" --allowed-hosts "${ALLOWED_HOSTS:-localhost:*,127.0.0.1:*,mlflow*}"
