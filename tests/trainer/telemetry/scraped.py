"""A scrape of a run, as Prometheus does it."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def scrape(port: int) -> dict[str, float]:
    """Return every sample by name and labels, as Prometheus parses it."""
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name
        + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items()) if key != "run"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
