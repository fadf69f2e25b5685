import sys

import pytest
from report_runs import opened

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Logging


def logging(tmp_path) -> Logging:
    return Logging(tensorboard=False, mlflow=f"file:{tmp_path / 'mlruns'}", project="tests")


def test_absent_it_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    for name in ("mlflow", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"logging\.mlflow: file:.* needs the package mlflow") as raised:
        opened(tmp_path, logging(tmp_path), 0)
    assert "pip install mlflow-skinny" in str(raised.value) and "remove logging.mlflow" in str(raised.value)


@pytest.fixture
def client(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"file:{tmp_path / 'mlruns'}")


def test_mlflow_reads_back_every_number_and_a_resume_continues_the_same_run(client, tmp_path):
    recipe = {"name": "tiny", "training": {"seed": 1, "epochs": None}, "long": "x" * 9000}
    for first, kept in ((0, (1, 2)), (2, (3,))):
        trackers = opened(tmp_path, logging(tmp_path), first, recipe)
        for step in kept:
            trackers.metrics({"step": step, "loss": 2.5 / step, "mfu": None, "validation_loss": {"web": 3.5}})
        trackers.metrics({"step": kept[-1], "grad_norm": float("nan")})
        trackers.close()
        recipe["training"] = {"seed": 2}  # a parameter that has a value keeps it
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == tmp_path.name and run.info.status == "FINISHED"
    assert run.data.params["training.seed"] == "1" and len(run.data.params["long"]) == 500
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.5), (2, 1.25), (3, 2.5 / 3)]
    assert run.data.metrics["validation_loss/web"] == 3.5 and "grad_norm" not in run.data.metrics


def test_a_store_that_fails_disables_mlflow_and_not_the_run(client, tmp_path, capsys):
    trackers = opened(tmp_path, logging(tmp_path), 0)
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    client.delete_run(run.info.run_id)
    for step in (1, 2):
        trackers.metrics({"step": step, "loss": 1.0})
    trackers.close()
    assert capsys.readouterr().err.count("a tracker cannot write (MLflow: ") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_address_that_is_none_is_refused(client, tmp_path):
    with pytest.raises(ConfigError, match=r"logging\.mlflow: nonsense://x cannot be used"):
        opened(tmp_path, Logging(tensorboard=False, mlflow="nonsense://x"), 0)
