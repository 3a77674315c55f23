"""schemathesis against a running rill's own description: whatever it sends, no answer is a 5xx or other than described.

usage: schemathesis_client.py BASE_URL      (BASE_URL without /v1; prints a transcript; exit 0 if everything held)
"""
import subprocess
import sys
import tempfile

BASE = sys.argv[1]
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
]
# `stateful` follows links between operations, of which the description has none.
PHASES = ["examples", "coverage", "fuzzing"]
EXAMPLES_MAX = 10

with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{BASE}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--phases", ",".join(PHASES), "--max-examples", str(EXAMPLES_MAX), "--generation-deterministic"]
    # One worker: two share what they drew without a lock, which is reported as a schema that cannot make up its mind.
    command += ["--workers", "1", "--request-timeout", "60", "--no-color"]
    command += ["--continue-on-failure", "--warnings", "off"]
    sys.exit(subprocess.run(command, cwd=folder, timeout=240, check=False).returncode)
