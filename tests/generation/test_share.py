"""Claims about several processes of one run that share questions: who answers which, and on which devices."""

import pytest
from helpers.generated import generated_config

from ril_jax import processes
from ril_jax.errors import InputError
from ril_jax.generation import share
from ril_jax.sampling import local


@pytest.fixture
def one_of(monkeypatch):
    """Make this process the third of as many as there are words, which are what each was given as --shard."""

    def make(*given):
        monkeypatch.setattr(processes, "count", lambda: len(given))
        monkeypatch.setattr(processes, "index", lambda: 2)
        monkeypatch.setattr(processes, "gather", lambda value, name: list(given))
        return given[2]

    return make


def test_one_process_answers_what_it_is_told():
    assert share.own_part(None) == share.own_part("") == (0, 1)
    assert share.own_part("3/8") == (3, 8)


def test_processes_of_a_run_take_a_part_each(one_of):
    assert share.own_part(one_of("", "", "", "")) == (2, 4)
    assert share.own_part(one_of("4/8", "5/8", "6/8")) == (6, 8)  # half of the parts; another run has the others


@pytest.mark.parametrize("given", [("0/3", "0/3", "0/3"), ("0/2", "1/2", ""), ("", "", "0/1")])
def test_processes_without_a_part_of_their_own_are_refused(one_of, given):
    with pytest.raises(InputError, match=r"the 3 processes of this run were given --shard .*; leave it out, and each"):
        share.own_part(one_of(*given))


def test_a_model_for_several_hosts_is_refused_in_one_line(one_of):
    config = generated_config("none")
    config.mesh.update(fsdp=1, tensor=4)
    one_of("", "", "", "")
    with pytest.raises(InputError, match=r"fit 1 devices.*of the 4 processes .* needs several hosts .* more memory"):
        local._mesh_of_this_host(config)
