"""Streaming inference: frames and questions in, descriptions and answers out. Never imports ROS.

    model = load_model('random')
    stream = model.open_stream('camera', StreamConfig())
    for update in stream.push(image, stamp_ns):
        print(update)
    for update in stream.ask('is the door open?'):
        print(update)

Importing this package does not import torch; `svlm_ros.engine.model` does.
"""
