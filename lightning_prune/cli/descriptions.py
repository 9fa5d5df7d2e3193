"""What the commands that Lightning parses say of themselves, and of the options that no class of ours declares."""

from lightning_prune.cli.signatures import Option

DESCRIPTION = {
    "fit": "Calibrate, prune, save and evaluate one model with one method.",
    "check": "Say what a run of fit with the same options would take: device and host memory, disk, bytes read, work. "
    "No weight is read; a folder with a config.json is enough.",
    "tune": "Choose refit, allocation, normalisation, protection and prior of a method that ranks groups by the loss "
    "on an eighth of the calibration set, which is held out: one calibration, then decisions from its scores. Takes "
    "the options of fit. A temperature of 0 leaves priors out.",
    "decide": "Make another pruning decision from the scores of a finished run, without calibrating: "
    "lightning-prune decide --run logs/wanda/version_0 --model.pruning_ratio 0.3.",
    "recover": "Train what pruning left, on text and by what the dense model predicts, and measure what that gave "
    "back.",
    "test": "Measure the perplexity of a dense or pruned model with the protocol of the pruning runs.",
}
EXAMPLES = {
    "fit": (
        "--config wanda",
        "--config wanda --model.pretrained path/to/llama --model.pruning_ratio 0.3 --data.dataset wikitext2",
    ),
    "check": ("--config wanda --model.pretrained path/to/llama --memory 24GiB",),
    "tune": ("--config hgsp_taylor --output tuned.yaml", "--config hgsp_taylor --trials 3 --model.temperature 0"),
    "recover": (
        "--config recover_lora --model.pretrained logs/wanda/version_0/pruned",
        "--config recover_full --model.pretrained logs/wanda/version_0/pruned --trainer.max_time 00:00:10:00",
    ),
    "test": ("--model.pretrained logs/wanda/version_0/pruned --data.eval_datasets '[wikitext2, ptb]'",),
}

_DEVICE = Option("accelerator", "auto", "cpu, gpu, or auto: a GPU where there is one")
_PRECISION = Option("precision", "32-true", "32-true, bf16-true, 16-true, bf16-mixed, 16-mixed or 64-true")
_ROOT = Option("default_root_dir", "logs", "where run folders go")
_LOGGER = Option("logger", "TensorBoard, in the run folder", "false for none, or a logger of Lightning")
_BAR = Option("enable_progress_bar", "true", "false says nothing on the way")
_PROCESSES = (
    Option("devices", "1", "processes on this machine, each with its share of the samples; -1: every GPU"),
    Option("num_nodes", "1", "machines, where torchrun or SLURM started the processes"),
)
_CALIBRATING = (_DEVICE, *_PROCESSES, _PRECISION, _ROOT, _LOGGER, _BAR)
TRAINER = {
    "fit": _CALIBRATING,
    "check": (_DEVICE, *_PROCESSES, _PRECISION),
    "tune": (_DEVICE, _PRECISION),
    "test": _CALIBRATING,
    "recover": (
        Option("max_epochs", "3", "how often the text is trained on, unless something else ends the run"),
        Option("max_steps", "-1", "optimiser steps after which it ends"),
        Option("max_time", "", "DD:HH:MM:SS after which it ends"),
        Option("accumulate_grad_batches", "1", "batches in one optimiser step"),
        _DEVICE,
        _PRECISION,
        _ROOT,
        _LOGGER,
        _BAR,
    ),
}

_CONFIG = Option("config NAME", "", "a shipped configuration by name, or a file; several overlay one another")
_SEED = Option("seed_everything", "0", "for all random numbers")
_PRINT = Option("print_config", "", "print the configuration that results, and end")
_TELLING = (
    Option("quiet", "", "print the last line alone and no progress"),
    Option("json", "", "print the metrics on stdout, all else on stderr"),
)
OWN = {
    "fit": (
        _CONFIG,
        Option("resume", "", "go on with the newest unfinished run of the same model, calibration set and options"),
        *_TELLING,
        _SEED,
        _PRINT,
    ),
    "check": (
        _CONFIG,
        Option("memory SIZE", "", "of a GPU that is not here, such as 24GiB"),
        Option("host-memory SIZE", "", "of another host, such as 64GiB"),
        Option("json", "", "print facts"),
        _PRINT,
    ),
    "tune": (
        _CONFIG,
        Option(
            "output FILE", "tuned.yaml", "the best configuration; all trials go beside it (.csv, .json, .tensorboard)"
        ),
        Option("trials N", "24", "options to try"),
        Option("resume", "", "go on with the trials that stand beside --output, after a kill or with higher numbers"),
        Option("overwrite", "", "replace what stands at --output"),
        _SEED,
        _PRINT,
    ),
    "test": (_CONFIG, *_TELLING, _SEED, _PRINT),
    "recover": (
        _CONFIG,
        Option("resume", "", "go on with the newest unfinished run, at the last saved state"),
        *_TELLING,
        _SEED,
        _PRINT,
    ),
}
