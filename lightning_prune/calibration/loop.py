"""All passes of a method as one sequence of steps: layers come and go, known findings are not made again."""

from collections.abc import Sequence

import torch

from lightning_prune.calibration.passes import WEIGHT, Batch, Finding, Pass, Setting, Step
from lightning_prune.calibration.results import Findings
from lightning_prune.calibration.stream_checkpoints import Waypoints


class Walk:
    """Takes the passes step by step.

    Args:
        passes: in order.
        setting: of the run.
        findings: what is known already and where the rest goes.
        waypoints: where residual streams are kept on the way; None: nowhere.
    """

    def __init__(
        self, passes: Sequence[Pass], setting: Setting, findings: Findings, waypoints: Waypoints | None = None
    ) -> None:
        self.passes, self.setting, self.findings = passes, setting, findings
        self.waypoints = waypoints or Waypoints(None)
        layers = setting.model.num_layers
        self.steps: list[tuple[Pass, Step]] = [(one, step) for one in passes for step in one.steps(layers)]
        self._open: Pass | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def open_steps(self) -> list[int]:
        """The steps to take: those of every pass of which something is not known, behind its waypoint if it has one."""
        unknown = {id(one) for number, (one, _) in enumerate(self.steps) if number not in self.findings}
        reached = self.waypoints.step
        past = {number for number in range(reached + 1) if self.steps[number][0] is self.steps[reached][0]}
        if not all(number in self.findings for number in past):  # a finding was damaged
            self.waypoints.clear()
            past = set()
        return [number for number, (one, _) in enumerate(self.steps) if id(one) in unknown and number not in past]

    def start(self, number: int) -> None:
        """The layer of this step comes in, the one of the next step is announced."""
        one, step = self.steps[number]
        if self._open is not one:
            self.close()
            self._open = one
            one.begin(self.setting)
            self.waypoints.begin()
            if number and number - 1 == self.waypoints.step:
                for name, values in self.waypoints.load().items():
                    one.put_back(name, values)
        if not self.setting.model.is_present(step.layer):
            self.setting.model.enter(step.layer)
            self._restore(number)
        if number + 1 < len(self.steps):
            self.setting.model.announce(self.steps[number + 1][1].layer)
        self.setting.model.overflow.forget()
        if number not in self.findings:
            one.start(step)

    def batch(self, number: int, batch: Batch) -> None:
        """One batch of this step."""
        one, step = self.steps[number]
        (one.skip if number in self.findings else one.batch)(step, batch)

    def finish(self, number: int) -> None:
        """The step's finding is kept, new weights take their place, the layer goes unless the next step needs it.

        Raises:
            FloatingPointError: something was NaN or infinite; names the layer. Nothing is kept of it then.
        """
        one, step = self.steps[number]
        if number not in self.findings:
            finding = one.finish(step)
            self.setting.model.overflow.raise_if_any()  # after what knows more exactly where
            finding = _from_first_process(finding)
            if one.changes(step):
                self._put_weights(step, {n.removeprefix(WEIGHT): t for n, t in finding.items() if n.startswith(WEIGHT)})
            self.findings.add(number, finding)
        elif one.changes(step):
            self._put_weights(step, self.findings.weights(number))
        one.advance(step)
        stays = number + 1 < len(self.steps) and self.steps[number + 1][1].layer == step.layer
        if not stays:
            self.setting.model.leave(step.layer, changed=one.changes(step))
        if number + 1 == len(self.steps):
            self.close()
        if number + 1 < len(self.steps) and self.steps[number + 1][0] is one:
            self.waypoints.offer(number, one.stores())
        else:
            self.waypoints.clear()

    def findings_of(self, name: str) -> list[tuple[Step, Finding]]:
        """What the steps of the pass called ``name`` left, without new weights."""
        return [(step, self.findings.of(number)) for number, (one, step) in enumerate(self.steps) if one.name == name]

    def weights_of(self, layer: int) -> Finding:
        """New weights of a layer by role, of the dense shape, and ``<role>.bias``; empty where nothing was changed."""
        found: Finding = {}
        for number, (_, step) in enumerate(self.steps):
            if step.layer == layer:
                found |= self.findings.weights(number)
        return found

    def cost(self, number: int, tokens: int) -> tuple[float, float]:
        """Work of a step with ``tokens`` tokens in tokens through a layer: while batches run, and to finish it."""
        one, step = self.steps[number]
        view = self.setting.model.views[step.layer]
        running = one.cost(view, step) * tokens if one.reads else 0.0
        return running, 0.0 if number in self.findings else one.cost_to_finish(view, step)

    def close(self) -> None:
        """End the open pass."""
        if self._open is not None:
            self._open.end()
            self._open = None

    def _restore(self, number: int) -> None:
        """New weights that earlier steps of the same layer and pass made, where the layer was out in between."""
        one, step = self.steps[number]
        for earlier in range(number):
            other, past = self.steps[earlier]
            if other is one and past.layer == step.layer and one.changes(past):
                self._put_weights(step, self.findings.weights(earlier))

    def _put_weights(self, step: Step, weights: Finding) -> None:
        view = self.setting.model.views[step.layer]
        for role, weight in weights.items():
            linear = view.linears[role]
            linear.weight = weight.to(device=linear.weight.device, dtype=linear.weight.dtype)


def _from_first_process(finding: Finding) -> Finding:
    """The first process's finding on every process: all go on from the same numbers, to the last bit."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return finding
    box: list[Finding] = [{name: tensor.cpu() for name, tensor in finding.items()}]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
