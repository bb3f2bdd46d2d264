"""One tiny model, one engine and one server for all tests of the server: what is compiled is compiled once."""

import dataclasses
from collections.abc import Iterator

import pytest
from helpers.served import Gate, Reference, running, served_config
from openai import OpenAI

from ril_jax.pretrained import Pretrained
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.local import load_engine
from ril_jax.sampling.server.app import Service


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    return Reference(tmp_path_factory.mktemp("served"))


@dataclasses.dataclass
class Served:
    """A server that runs, and what is behind it."""

    url: str
    model: Pretrained
    engine: Engine
    gate: Gate
    reference: Reference

    def client(self, **kwargs) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **kwargs)

    def service(self, *, api_key: str = "", engine: Engine | None = None, **changes) -> Service:
        """Another service over the same engine (or over `engine`), with changed fields of the config."""
        service = Service(served_config(self.reference.folder, **changes), model_name="tiny", api_key=api_key)
        service.open(self.model, engine or self.engine)
        return service

    def another_engine(self) -> Engine:
        """An engine of its own over the same compiled programs; not started."""
        with self.engine.counter.expected():  # an empty cache is made
            return Engine(
                self.engine.programs, self.engine.params,
                image_token_id=self.model.chat.image_token_id, counter=self.engine.counter,
            )  # fmt: skip


@pytest.fixture(scope="session")
def served(reference) -> Iterator[Served]:
    config = served_config(reference.folder)
    model, engine = load_engine(config)
    gate = Gate(engine)
    engine.start()
    service = Service(config, model_name="tiny")
    service.open(model, engine)
    with running(service) as url:
        yield Served(url, model, engine, gate, reference)
    engine.close()


@pytest.fixture
def client(served) -> OpenAI:
    return served.client()
