"""What a user sees of a run."""

from types import SimpleNamespace

from transformers import TrainerControl, TrainerState, TrainingArguments

from transformers_resps.trainers.base import TrainingProgress


def test_a_log_is_one_line_with_step_epoch_metrics_and_time_left(tmp_path, capsys):
    clock = SimpleNamespace(seconds=100.0)
    progress = TrainingProgress(lambda: clock.seconds)
    args, control = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True), TrainerControl()
    state = TrainerState(global_step=20, max_steps=60, epoch=0.25)
    progress.on_train_begin(args, state, control)
    progress.on_step_begin(args, state, control)
    clock.seconds, state.global_step = 130.0, 30
    progress.on_step_end(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 3.14159265, "epoch": 0.25, "total_flos": 0.0})
    assert capsys.readouterr().out == "step 30/60  epoch 0.25  loss 3.142  ETA 0:01:30\n"


def test_the_bar_begins_where_a_resumed_run_does_and_shows_the_newest_metrics(tmp_path, capsys):
    progress = TrainingProgress()
    args, control = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=False), TrainerControl()
    state = TrainerState(global_step=20, max_steps=60, epoch=0.25)
    progress.on_train_begin(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 2.5, "tokens_per_second": 812.0})
    bar = progress.training_bar
    assert (bar.n, bar.total, bar.postfix) == (20, 60, "loss=2.5, tokens_per_second=812")
    progress.on_train_end(args, state, control)
    assert progress.training_bar is None


def test_other_processes_show_nothing(tmp_path, capsys):
    progress = TrainingProgress()
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    progress.on_train_begin(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 1.0})
    progress.on_train_end(args, state, control)
    shown = capsys.readouterr()
    assert not shown.out + shown.err
