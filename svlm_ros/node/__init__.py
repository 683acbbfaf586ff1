"""The ROS 2 node: camera topics in, descriptions, answers and diagnostics out. Touches no tensors.

`node.py` is the node, `main.py` its process, `ask.py` the command-line client; each other module
holds one part of it. Not for: choosing words (see `svlm_ros.engine`).
"""
