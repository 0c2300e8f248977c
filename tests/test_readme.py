"""The front door says what the code does."""

import re

from runs import ROOT
from settings import WHERE, described, written

README = (ROOT / "README.md").read_text()


def test_the_reference_of_settings_is_the_codes():
    assert written(README) == README, "write it anew with: python tests/settings.py"


def test_every_setting_has_its_default_and_meaning():
    from finetune.qnli import Settings
    from pretrain.recipe import Recipe

    for (floor, (file, name)), settings in zip(WHERE.items(), (Recipe(), Settings()), strict=True):
        keys = [re.match(r"`(\w+)=(.*?)`", one) for one in described(file, name)]
        assert {key[1]: key[2] for key in keys} == {key: str(value) for key, value in vars(settings).items()}, floor


def test_it_stays_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 200
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_option_of_its_commands_exists():
    """Each `--option` and `key=` in a line that starts one of our commands."""
    import shlex

    from finetune.qnli import options as task
    from pretrain.general import options as general

    joined = re.sub(r"\\\n\s*", " ", README)
    lines = [line.partition(" #")[0] for line in joined.splitlines()]
    for line in lines:
        for start, parse in (("launch/general.sh ", general), ("finetune/qnli.py ", task)):
            command, found, rest = line.partition(start)
            if found and command.startswith(("deepspeed", "bash", "python")) and "..." not in rest:
                parse(shlex.split(rest))
