"""What is known of devices: data sheets, targets such as tpu:v5e-8, and this machine."""
