"""A pytest plugin that runs every nth test: `pytest -p bench.shard --shard=0/16`.

Compiling their kernels is nearly all that the tests do on a GPU, so they run in as many processes as there are cores.
It asks for no package beside pytest, unlike pytest-xdist.
"""


def pytest_addoption(parser):
    parser.addoption("--shard", help="i/n: of the tests, counted from 0, those whose number is i modulo n")


def pytest_collection_modifyitems(config, items):
    if shard := config.getoption("--shard"):
        i, n = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % n != i])
        items[:] = items[i::n]
