"""Images, sound and video: files read and made into what the encoders take."""
