"""Devices: data sheets, targets such as tpu:v5e-8, the kinds of processor, and why a device is not used."""
