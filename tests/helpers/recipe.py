"""Arguments of a run that is easy to verify: plain SGD on the CPU, a log entry per step, no checkpoints."""

PLAIN_SGD = {
    "optim": "sgd",
    "max_grad_norm": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
