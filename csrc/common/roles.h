// The places that an operation's tensors have in a row, for the host and for devices. The first role always takes part.
#pragma once

namespace sam {

enum NormRole { kNormGrad, kNormParam, kNormRoles };  // of centralisations too
enum DirectionRole { kDirectionGrad, kDirectionEma, kDirectionParam, kDirectionRoles };
enum DotsRole { kDotsLeft, kDotsRight, kDotsOrigin, kDotsRoles };
enum CombineRole { kCombineOut, kCombineLeft, kCombineRight, kCombineOrigin, kCombineRoles };
enum CopyRole { kDestination, kSource, kCopyRoles };
enum RandomRole { kRandomParam, kRandomOldParam, kRandomRoles };

// The ascent, and what it shares with updates.
enum PerturbRole { kParam, kGrad, kOldParam, kPerturbRoles };
enum PerturbVariantRole { kEma = kPerturbRoles, kPerturbVariantRoles };
enum SgdRole { kBuffer = kPerturbRoles, kSgdRoles };
enum AdamRole { kExpAvg = kPerturbRoles, kExpAvgSq, kAdamRoles };

constexpr int kMostRoles = kAdamRoles;

}  // namespace sam
