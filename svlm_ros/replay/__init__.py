"""Programs over recorded bags: replay through the engine, and play onto topics.

`main` (svlm-replay) runs in process and needs no ROS; only `player` (svlm-play) imports rclpy.
"""
