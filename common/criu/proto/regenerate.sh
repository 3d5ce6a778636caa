#!/bin/sh
# Makes *_pb2.py and *_pb2.pyi anew from the .proto files beside this script.
#
#   pip install grpcio-tools==1.85.1      (brings protoc 35.1; not needed at run time)
#   common/criu/proto/regenerate.sh [PYTHON]
#
# protoc writes absolute imports of its sibling modules; inside a package they must be relative.
set -eu
python=$(command -v "${1:-python3}")
cd "$(dirname "$0")"
rm -f ./*_pb2.py ./*_pb2.pyi
"$python" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. ./*.proto
sed -i -E \
    -e 's/^import ([a-z0-9_]+_pb2) as /from . import \1 as /' \
    ./*_pb2.py ./*_pb2.pyi
