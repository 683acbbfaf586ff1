"""Which engine the name of a model stands for; imports torch only for those that need it.

Not for: loading checkpoints (see model.py).
"""
from svlm_ros.engine.worker import Engine

NULL_MODEL = 'null'


def load_engine(model: str, device: str = 'auto', dtype: str = 'auto',
                null_token_delay_sec: float = 0.0) -> Engine:
    """Return the engine of a model's name.

    :param model: `null` for no model at all; all other names as in `load_model`.
    :param null_token_delay_sec: makes `null` as slow as a model.
    :raises EngineError: the model cannot be loaded.
    :raises ImportError: torch or transformers is not installed.
    """
    if model == NULL_MODEL:
        from svlm_ros.engine.null import NullEngine
        return NullEngine(null_token_delay_sec)
    from svlm_ros.engine.model import load_model
    return load_model(model, device, dtype)
