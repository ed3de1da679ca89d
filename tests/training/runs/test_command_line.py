import pytest

from runs.command_line import run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("No prompts. Pass some."), 2, "No prompts. Pass some.\n"),
        (OSError("No space left on device"), 2, "No space left on device\n"),
        (KeyboardInterrupt(), 130, "Stopped. Run the same command to continue.\n"),
    ],
)
def test_what_a_command_refuses_ends_it_with_its_message_alone(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(refuse)
    assert ended.value.code == status and capsys.readouterr().err == said
