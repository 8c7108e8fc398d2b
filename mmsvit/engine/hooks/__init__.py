"""All hooks of mmsvit; importing this package registers them."""

from .bad_samples_hook import BadSamplesHook
from .check_dataset_hook import CheckDatasetHook
from .deploy_hook import DeployHook
from .drop_path_hook import DropPathHook
from .exact_resume_hook import ExactResumeHook
from .log_errors_hook import LogErrorsHook
from .non_finite_hook import NonFiniteHook
from .ops_backend_hook import OpsBackendHook
from .run_record_hook import RunRecordHook
from .safe_checkpoint_hook import SafeCheckpointHook
from .stop_signal_hook import StopSignalHook
from .strict_checkpoint_hook import StrictCheckpointHook
from .super_token_visualization_hook import SuperTokenVisualizationHook

__all__ = [
    'BadSamplesHook',
    'CheckDatasetHook',
    'DeployHook',
    'DropPathHook',
    'ExactResumeHook',
    'LogErrorsHook',
    'NonFiniteHook',
    'OpsBackendHook',
    'RunRecordHook',
    'SafeCheckpointHook',
    'StopSignalHook',
    'StrictCheckpointHook',
    'SuperTokenVisualizationHook',
]
