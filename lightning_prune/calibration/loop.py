"""The calibration loop: all passes of a stage as one sequence of steps, in Lightning's terms one epoch each.

Layers come and go; results that are known already are not made again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Batch, Pass, Setting, Step
from lightning_prune.calibration.results import Results
from lightning_prune.calibration.stream_checkpoints import StreamCheckpoints
from lightning_prune.models.experts import ROLE


class CalibrationLoop:
    """Takes the passes step by step: ``start``, ``batch`` for every batch, ``finish``, until none is ``remaining``.

    ``results``: what is known already, and where the rest is kept. ``advance``: told the work that was done, in tokens
    through a layer, and where.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        setting: Setting,
        results: Results,
        streams: StreamCheckpoints | None = None,
        advance: Callable[[float, str], None] = lambda work, where: None,
    ) -> None:
        self.passes, self.setting, self.results, self.advance = passes, setting, results, advance
        self.streams = streams or StreamCheckpoints(None)
        self.steps: list[tuple[Pass, Step]] = []
        for current in passes:
            current.result_of = self.whole_result
            self.steps += [(current, step) for step in current.steps(setting.model.views)]
        self.remaining = self._remaining()
        self._open: Pass | None = None
        self._finish_work = 0.0

    @property
    def reads(self) -> bool:
        """Whether the next step needs the calibration batches."""
        return self.steps[self.remaining[0]][0].reads

    @property
    def epochs(self) -> int:
        """Epochs of the trainer still to come: remaining steps that need batches."""
        return sum(self.steps[number][0].reads for number in self.remaining)

    def start(self) -> None:
        """Bring in the layer of the next step, and announce the one after it."""
        number = self.remaining[0]
        current, step = self.steps[number]
        model = self.setting.model
        if self._open is not current:
            self._close()
            self._open = current
            current.begin(self.setting)
            if number and number - 1 == self.streams.step:
                for name, values in self.streams.load().items():
                    current.store(name).put(slice(0, len(values)), values)
        if not model.is_present(step.layer):
            model.enter(step.layer)
            for earlier, (other, past) in enumerate(self.steps[:number]):  # the layer was out in between
                if other is current and past.layer == step.layer and current.changes:
                    self._put_weights(step, self.results.whole(earlier).weights)
        if number + 1 < len(self.steps):
            model.announce(self.steps[number + 1][1].layer)
        model.overflow.forget()
        if number not in self.results:
            current.start(step)

    def batch(self, batch: Batch) -> None:
        """Take one batch through the layer of this step."""
        number = self.remaining[0]
        current, step = self.steps[number]
        (current.skip if number in self.results else current.batch)(step, batch)
        running, self._finish_work = self.work(number, batch.tokens.numel())
        self.advance(running, self._where(number))

    def finish(self) -> None:
        """End the step: keep its result, put new weights in place, drop the layer unless the next step needs it.

        Raises:
            FloatingPointError: something was NaN or infinite; names the layer. Nothing is kept of it then.
        """
        number, model = self.remaining[0], self.setting.model
        current, step = self.steps[number]
        following, after = self.steps[number + 1] if number + 1 < len(self.steps) else (None, None)
        if number not in self.results:
            result = current.finish(step)
            model.overflow.raise_if_any()  # after what knows more exactly where
            result = _from_first_process(result)
            if current.changes:
                self._put_weights(step, result.weights)
            self.results.add(number, result)
        elif current.changes:
            self._put_weights(step, self.results.whole(number).weights)
        current.advance(step)
        if current.changes:
            model.overflow.raise_if_any()
        if after is None or after.layer != step.layer:
            model.leave(step.layer, changed=current.changes)
        if following is current:
            self.streams.offer(number, current.stores)
        else:
            self.streams.clear()
        self.remaining.pop(0)
        if not self.remaining:
            self._close()

    def advance_finish(self, share: float) -> None:
        """Count a share of this step's work after its last batch as done."""
        if self.remaining:
            self.advance(share * self._finish_work, self._where(self.remaining[0]))

    def results_of(self, name: str) -> list[tuple[Step, LayerResult]]:
        """Results of the pass ``name`` by layer, without new weights."""
        results = [
            (step, self.results.of(number)) for number, (current, step) in enumerate(self.steps) if current.name == name
        ]
        return sorted(results, key=lambda pair: pair[0].layer)

    def whole_result(self, name: str, layer: int) -> LayerResult:
        """The last result of a layer in the pass ``name``, with everything that is on disk."""
        numbers = [n for n, (current, step) in enumerate(self.steps) if (current.name, step.layer) == (name, layer)]
        return self.results.whole(numbers[-1])

    def new_parameters_of(self, layer: int) -> dict[str, Tensor]:
        """New weights of a layer by role, of the dense shape, and ``<role>.bias``; empty where nothing was changed."""
        parameters: dict[str, Tensor] = {}
        for number, (_, step) in enumerate(self.steps):
            if step.layer == layer:
                parameters |= self.results.whole(number).new_parameters
        return parameters

    def work(self, number: int, tokens: int) -> tuple[float, float]:
        """Work of a step with ``tokens`` tokens in tokens through a layer: while batches run, and to finish it."""
        current, step = self.steps[number]
        view = self.setting.model.views[step.layer]
        running = current.cost(view, step) * tokens if current.reads else 0.0
        return running, 0.0 if number in self.results else current.cost_to_finish(view, step)

    def _close(self) -> None:
        if self._open is not None:
            self._open.end()
            self._open = None

    def _remaining(self) -> list[int]:
        """Steps still to run: all steps of unfinished passes, from the last saved residual stream on."""
        unfinished = {id(current) for number, (current, _) in enumerate(self.steps) if number not in self.results}
        reached = self.streams.step
        past = {number for number in range(reached + 1) if self.steps[number][0] is self.steps[reached][0]}
        if not all(number in self.results for number in past):  # a result was damaged
            self.streams.clear()
            past = set()
        return [number for number, (one, _) in enumerate(self.steps) if id(one) in unfinished and number not in past]

    def _where(self, number: int) -> str:
        current, step = self.steps[number]
        return f"{current.name}, layer {step.layer + 1} of {self.setting.model.num_layers}"

    def _put_weights(self, step: Step, weights: dict[str, Tensor]) -> None:
        view = self.setting.model.views[step.layer]
        for role, weight in weights.items():
            if role == ROLE and view.experts is not None:
                view.experts.replace_down(view.experts.down_parameters(weight))
                continue
            linear = view.linears[role]
            linear.weight = weight.to(device=linear.weight.device, dtype=linear.weight.dtype)


def _from_first_process(result: LayerResult) -> LayerResult:
    """The first process's result on every process: all continue with the same numbers, to the last bit."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return result
    box = [result.on_host()]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
