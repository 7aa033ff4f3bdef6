"""A real TorchServe loses its workers, its Java process and its room for more, while the Python client asks it.

Workers are stopped first and killed when they hold requests for sure: what a test is about has then happened.
"""

from __future__ import annotations

import re
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests

from benchmarks.faults import Scene
from benchmarks.probes import Crowd, KnownImages, Note, client_of, is_whole, ready_workers, workers_of
from benchmarks.serving.workload import SMALL
from clients.python.classify import IN_FLIGHT
from tests.conftest import replace_in_archive

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

CROWD = 300  # requests at once beside a batch of 32 in each worker: more than the queue's 200
SECONDS = 90  # of the patience with a machine that is busy


@pytest.fixture(scope="module")
def model(run: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive, whose worker may sleep for minutes before it is replaced, and its graph and spec."""
    folder = tmp_path_factory.mktemp("model")
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        config = archive.read("model-config.yaml").decode()
    patient = re.sub(r"(?m)^responseTimeout: \d+", "responseTimeout: 300", config)
    assert patient != config
    replace_in_archive(exported / "digits.mar", folder / f"{SMALL}.mar", {"model-config.yaml": patient})
    shutil.copy(exported / "digits.crops.onnx", folder / f"{SMALL}.crops.onnx")
    shutil.copy(run / "spec.json", folder)
    return folder


@pytest.fixture(scope="module")
def images(model: Path) -> KnownImages:
    found = KnownImages.of(model)
    assert len(found.bodies) > 50
    assert not found.is_correct(0, found.predictions[1])
    assert not found.is_correct(0, {})
    return found


@pytest.fixture(scope="module")
def scene(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with ExitStack() as stack:
        scene = Scene(model / f"{SMALL}.mar", tmp_path_factory.mktemp("scene"), stack)
        scene.start()
        yield scene


@pytest.fixture
def notes(scene: Scene, images: KnownImages, tmp_path: Path) -> Iterator[list[Note]]:
    """What the Python client's requests came to so far; at the end each image must have its one correct prediction."""
    notes: list[Note] = []
    crowd = Crowd(client_of(scene.server, notes, retry_seconds=2 * SECONDS), images, tmp_path / "images")
    crowd.start()
    try:
        until(lambda: len(notes) > 200)
        yield notes
        before = len(notes)
        until(lambda: sum(note.status == 200 for note in notes[before:]) > 200 or not crowd.is_alive())
    finally:
        verdict = crowd.verdict()
    assert is_whole(verdict), verdict


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {SECONDS} s in vain"
        time.sleep(0.05)


def waiting(scene: Scene) -> int:
    """Requests in the server's queue: there are some for long only if every worker that could take them holds some."""
    headers = {"Authorization": f"Bearer {scene.server.key('management')}"}
    (state,) = requests.get(f"{scene.server.management_url}/models/{SMALL}", headers=headers, timeout=30).json()
    return state["jobQueueStatus"]["pendingRequests"]


def test_the_excess_is_refused_while_the_rest_waits_and_is_answered(scene, images):
    url, headers = f"{scene.server.url}/predictions/{SMALL}", {"Authorization": f"Bearer {scene.server.key()}"}
    statuses: Counter[int] = Counter()

    def ask(number: int) -> bool:
        body = images.bodies[number % len(images.bodies)]
        reply = requests.post(url, data=body, headers=headers, timeout=SECONDS + 60)
        statuses[reply.status_code] += 1
        return reply.status_code == 503 or images.is_correct(number, reply.json())

    workers = workers_of(scene.server)
    crowd = CROWD + 32 * scene.workers
    with ThreadPoolExecutor(crowd) as pool:
        for worker in workers:
            worker.suspend()
        try:
            answers = [pool.submit(ask, number) for number in range(crowd)]
            until(lambda: waiting(scene) == 200 and sum(statuses.values()) >= crowd - 200 - 32 * scene.workers)
            assert set(statuses) == {503}  # at once: nobody is there who could answer otherwise
        finally:
            for worker in workers:
                worker.resume()
        assert all(answer.result() for answer in answers)
    assert statuses.keys() == {200, 503}
    assert statuses[200] >= 200
    statuses.clear()
    with ThreadPoolExecutor(100) as pool:  # within the bound
        assert all(pool.map(ask, range(1000)))
    assert statuses == {200: 1000}
    assert workers_of(scene.server) == workers


@pytest.mark.parametrize("which", ["one", "all"])
def test_workers_that_are_killed_with_requests_cost_no_image(scene, notes, which):
    victims = workers_of(scene.server)[: 1 if which == "one" else None]
    for victim in victims:
        victim.suspend()
    if len(victims) == scene.workers:
        until(lambda: waiting(scene))
    else:
        before = len(notes)
        until(lambda: len(notes) > before + IN_FLIGHT)
    for victim in victims:
        victim.kill()
    assert not psutil.wait_procs(victims, timeout=SECONDS)[1]  # one that is about to die looks like one that runs
    until(lambda: ready_workers(scene.server) == scene.workers)
    assert not set(workers_of(scene.server)) & set(victims)
    until(lambda: {note.status for note in notes} & {500, 507})  # those that the killed ones held


def test_a_java_process_that_is_killed_takes_its_workers_along_and_costs_no_image(scene, notes):
    key, workers = scene.server.key(), workers_of(scene.server)
    workers[0].parent().kill()
    scene.server.process.wait(SECONDS)
    assert not psutil.wait_procs(workers, timeout=SECONDS)[1]
    scene.start()
    assert scene.server.key() != key
    assert 0 in {note.status for note in notes}
