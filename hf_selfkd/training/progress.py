"""A progress bar and a table of exits in place of the dictionaries that the stock callbacks print."""

from tqdm.auto import tqdm
from transformers import ProgressCallback

_MIN_WIDTH = 6


class ProgressTable(ProgressCallback):
    """Show one progress bar, and print a row per evaluation: epoch, training loss and the score of every exit.

    It replaces the stock callback::

        trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        trainer.add_callback(ProgressTable())

    In training an evaluation marks the progress bar instead of drawing one of its own. Where training evaluates
    nothing, each logged loss is a row. ``disable_tqdm`` hides the bar and keeps the rows.

    Args:
        metric: The score in the columns, in percent: ``accuracy`` or, for segmentation, ``mean_iou``.
    """

    def __init__(self, metric: str = "accuracy"):
        super().__init__()
        self.metric = metric
        self.loss = float("nan")
        self.header: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Draw the bar, at the step from which a run resumes."""
        self.current_step, self.header = state.global_step, None
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = tqdm(**steps, unit="step", dynamic_ncols=True, disable=args.disable_tqdm)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Mark the bar in training; outside of it draw one, as the stock callback does."""
        if self.training_bar is not None:
            self.training_bar.set_description("evaluating")
        elif not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        """Remove the mark."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a row where the exits were evaluated, or the loss alone where training evaluates nothing."""
        if self.training_bar is None:
            return
        self.loss = logs.get("loss", self.loss)
        scores = self._exit_scores(logs)
        if scores or ("loss" in logs and args.eval_strategy == "no"):
            self._write_row({"epoch": f"{state.epoch:.4g}", "loss": f"{self.loss:.4f}"} | scores)

    def _exit_scores(self, logs: dict[str, float]) -> dict[str, str]:
        """Return the scores in percent under ``exit 0``, ..., ``ensemble``: what remains of the metrics' names."""
        found = {}
        for name, value in logs.items():
            exit = name.removeprefix("eval_").removesuffix(f"_{self.metric}").replace("_", " ")
            if name.endswith(f"_{self.metric}") and (exit == "ensemble" or exit.startswith("exit ")):
                found[exit] = f"{100 * value:.2f}"
        return found

    def _write_row(self, row: dict[str, str]) -> None:
        widths = [max(_MIN_WIDTH, len(name)) + 2 for name in row]
        header, line = (
            "".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))
            for words in (row.keys(), row.values())
        )
        if header != self.header:
            self.training_bar.write(header)
            self.header = header
        self.training_bar.write(line)
