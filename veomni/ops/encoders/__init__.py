"""Encoders of images, videos and audio: dummies, sharing and balance over ranks."""
