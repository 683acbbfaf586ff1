"""svlm_ros: a streaming vision-language model that watches a robot's cameras (arXiv 2510.09608).

Three rooms, and data walks one way through them: `engine` (streaming inference, never imports
ROS), `node` (ROS only, never touches tensors) and the programs over both (`replay`).
"""
from pkgutil import extend_path

# The generated svlm_ros.msg, .srv and .action may live in another folder than these sources.
__path__ = extend_path(__path__, __name__)
__version__ = '0.1.0'
