"""An Airflow DAG that runs the sanitize command: score new shards, split them, check every byte, hand on the clean folder.

For Airflow 3, with `sanitize` on the PATH of the workers. A retry is harmless and cheap: finished shards are not done twice.
"""

import json
import subprocess
from typing import Any

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

NO_RETRY_HELPS = (2, 3)  # wrong settings; refused, for example because more than half would be removed


def run_sanitize(*arguments: str) -> dict[str, Any]:
    """The result of one command (docs/schemas/result_<command>.schema.json). What it says meanwhile goes to the log of the task."""
    done = subprocess.run(["sanitize", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode in NO_RETRY_HELPS:
        raise AirflowFailException(f"sanitize {arguments[0]}: exit code {done.returncode}. The log says why.")
    if done.returncode:
        raise RuntimeError(
            f"sanitize {arguments[0]}: exit code {done.returncode}. The next try does only what is left."
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@dag(
    schedule=None,
    params={
        "shards": "s3://bucket/shards",
        "detector": "s3://bucket/detector",
        "out": "s3://bucket/scanned",
        "fpr": 0.01,
    },
    default_args={"retries": 3},
)
def clean_training_data() -> None:
    @task
    def scan(params: dict[str, Any]) -> dict[str, Any]:
        where = ("--detector", params["detector"], "--out", params["out"])
        return run_sanitize("scan", params["shards"], *where, "--fpr", str(params["fpr"]))

    @task
    def verify(scanned: dict[str, Any]) -> str:
        run_sanitize("verify", scanned["out"])
        return f"{scanned['out']}/clean"

    verify(scan())


clean_training_data()
