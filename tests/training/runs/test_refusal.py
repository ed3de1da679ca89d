import pytest

from runs.refusal import run


def test_what_a_command_refuses_ends_it_with_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ValueError("No prompts. Pass some.")

    with pytest.raises(SystemExit) as ended:
        run(refuse)
    assert ended.value.code == 2 and capsys.readouterr().err == "No prompts. Pass some.\n"
