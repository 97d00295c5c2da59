"""The streaming core: a source is read tensor by tensor, converted as a plan says, and written so that a kill
leaves nothing that looks finished."""
