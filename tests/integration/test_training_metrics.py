"""What Prometheus sees of a run: every number of training that the Grafana dashboard draws."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import ray

from shared.config import parse_config
from tests.integration.helpers import REPOSITORY, training_tree, wait_until
from trainer.loop import train_run
from trainer.metrics import PROMETHEUS_NAME, read_metrics

SAMPLE = re.compile(rf"^ray_{PROMETHEUS_NAME}{{(.*)}} (\S+)$", re.MULTILINE)


def scraped() -> dict[str, float]:
    """Values by metric of the run `measured`, from the port that a scrape would ask."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as reply:
        text = reply.read().decode()
    values = {}
    for labels, value in SAMPLE.findall(text):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if named["run"] == "measured":
            values[named["metric"]] = float(value)
    return values


def test_every_training_number_of_the_dashboard_is_shown(local_ray: None, toy_folder: Path, tmp_path: Path) -> None:
    tree = training_tree(toy_folder, tmp_path / "measured", "local", train={"steps": 2, "validate_every": 2})
    assert train_run(parse_config(tree, "test"), resume=False)
    last = read_metrics(tmp_path / "measured")[-1]
    wait_until(lambda: scraped().get("step") == 1, 60, "the last step is not shown")
    values = scraped()
    numbers = {name: value for name, value in last.items() if isinstance(value, int | float)}
    assert values == {name: float(value) for name, value in numbers.items()}
    dashboard = json.loads((REPOSITORY / "deploy/monitoring/dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    drawn = [found.groups() for query in queries for found in re.finditer(r'metric(=~?)"([^"]+)"', query)]
    assert len(drawn) >= 7
    for how, name in drawn:
        parts = name.split("|") if how == "=~" else [re.escape(name)]
        for part in parts:
            assert any(re.fullmatch(part, shown) for shown in values), f"{name}: not among {sorted(values)}"
