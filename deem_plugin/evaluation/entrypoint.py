"""Registers the model `deem` with lmms-eval and shows it our tasks, importing nothing heavy."""

import functools
import importlib.util
import inspect
import logging
import sys
from importlib.abc import MetaPathFinder

from lmms_eval.models.registry_v2 import ModelManifest

from deem_plugin.resources import lmms_tasks_dir

logger = logging.getLogger(__name__)

_TASKS_MODULE = "lmms_eval.tasks"


def manifest() -> ModelManifest:
    """
    Describes the model `deem`; lmms-eval calls this when it loads the entry points of `lmms_eval.models`.

    Never raises: one failing entry point makes lmms-eval ignore those of all other packages.
    """
    try:
        _show_tasks()
    except Exception as error:
        logger.warning("lmms-eval cannot see the tasks of deem-plugin: %s", error)
    return ModelManifest(
        model_id="deem",
        chat_class_path="deem_plugin.evaluation.lmms.DeemChat",
        simple_class_path="deem_plugin.evaluation.lmms.DeemSimple",
    )


def _show_tasks() -> None:
    """
    Adds our tasks to what lmms-eval's `TaskManager` indexes, now or as soon as its module is imported.

    lmms-eval has entry points for models but none for tasks (0.7.3); this can go when it has.
    """
    if module := sys.modules.get(_TASKS_MODULE):
        _include_our_tasks(module)
    elif not any(isinstance(finder, _TasksImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TasksImport())


class _TasksImport(MetaPathFinder):
    """Waits for the first import of `lmms_eval.tasks`, which takes seconds and which many commands never need."""

    def find_spec(self, fullname, path=None, target=None):
        """Finds the module as always, and has our folder included once it is executed."""
        if fullname != _TASKS_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_include(module):
                execute(module)
                _include_our_tasks(module)

            spec.loader.exec_module = execute_and_include
        return spec


def _include_our_tasks(module) -> None:
    """Wraps `TaskManager.__init__` so that its `include_path` ends with our folder; others' tasks of a name win."""
    manager = module.TaskManager
    init = manager.__init__
    signature = inspect.signature(init)
    if getattr(init, "includes_deem_tasks", False):
        return
    if not {"include_path", "include_defaults"} <= signature.parameters.keys():
        logger.warning(
            "This lmms-eval finds the tasks of deem-plugin only with `--include_path %s`.", lmms_tasks_dir()
        )
        return
    ours = str(lmms_tasks_dir())

    @functools.wraps(init)
    def init_with_our_tasks(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if call.arguments["include_defaults"]:
            given = call.arguments["include_path"] or []
            call.arguments["include_path"] = [*([given] if isinstance(given, str) else given), ours]
        init(*call.args, **call.kwargs)

    init_with_our_tasks.includes_deem_tasks = True
    manager.__init__ = init_with_our_tasks
